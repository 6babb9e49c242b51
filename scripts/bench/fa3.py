"""FlashAttention-3 to measure against, with nothing to build: the wheel of xformers 0.0.34 on PyPI carries its kernels,
forward and backward, as a library on PyTorch's stable ABI, which PyTorch 2.10 and later load.

python scripts/bench/fa3.py DIR     fetches two wheels and leaves DIR/_C.so.xz (34 MB: small enough to carry to a machine
                                    without a network) and DIR/libcudart.so.12
"""

import ctypes
import lzma
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = ("xformers==0.0.34", "nvidia-cuda-runtime-cu12==12.8.90")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")
COMPRESSION = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 256 << 20}]


def fetch(directory: Path) -> None:
    """Download the two libraries into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", wheels]
        for_target = [
            "--python-version",
            "3.12",
            "--implementation",
            "cp",
            "--abi",
            "cp39",
            "--abi",
            "abi3",
            "--abi",
            "none",
        ]
        for platform in PLATFORMS:
            for_target += ["--platform", platform]
        for wheel in WHEELS:
            subprocess.run([*download, *for_target, wheel], check=True)
        for path in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(path) as wheel:
                for member in wheel.namelist():
                    if member.endswith("flash_attn_3/_C.so"):
                        with (
                            wheel.open(member) as source,
                            lzma.open(directory / "_C.so.xz", "wb", filters=COMPRESSION) as to,
                        ):
                            shutil.copyfileobj(source, to, 1 << 24)
                    elif member.endswith("libcudart.so.12"):
                        (directory / "libcudart.so.12").write_bytes(wheel.read(member))


def load(directory: Path) -> None:
    """Register torch.ops.flash_attn_3 from what `fetch` left in `directory`."""
    import torch

    with tempfile.TemporaryDirectory() as unpacked:  # once loaded, the file may go
        library = Path(unpacked, "_C.so")
        with lzma.open(directory / "_C.so.xz") as source, open(library, "wb") as to:
            shutil.copyfileobj(source, to, 1 << 24)
        ctypes.CDLL(str((directory / "libcudart.so.12").resolve()), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    fetch(Path(sys.argv[1]))
