"""`axo-flash doctor`: what will run on this machine, why not something better, and whether the kernel is right."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from axo_flash.report import device_description, table, versions

Say = Callable[[str], None]
KERNEL_SECONDS = 300
OUT_SLACK, GRADIENT_SLACK = 2.0, 3.0  # times the error of the same formula in plain low precision


def doctor(say: Say = print) -> int:
    """Print the state of this machine. Returns 0 if training can run here, 1 if not (the last lines say why)."""
    import torch

    found = versions()
    verdict = kernel_verdict()
    rows = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("device", device_description()),
        *((name, version or "not installed") for name, version in found.items() if name != "python"),
        ("precision", precision()),
        ("attention", "\n".join(attention_lines(torch.device("cuda" if torch.cuda.is_available() else "cpu")))),
        ("kernel", verdict.text),
        ("quantisation", quantisation()),
        ("FUSE mounts", fuse()),
    ]
    say(table(rows))
    say("")
    say("training can run here" if verdict.usable else "training cannot run here: the kernel's numbers are wrong")
    return 0 if verdict.usable else 1


def precision() -> str:
    """What bf16: auto means here."""
    import torch

    from axo_flash.model import cpu_has_bf16

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16 (no bfloat16)"
    return "bfloat16" if cpu_has_bf16() else "float32 (this CPU does not multiply bfloat16)"


def attention_lines(device) -> list[str]:
    """Which backend serves a Llama-2-7B attention layer on `device` in each dtype, and why not a better one."""
    from axo_flash.kernels.backends import choose_backend
    from axo_flash.kernels.spec import AttentionSpec

    lines = []
    for dtype in ("bfloat16", "float16", "float32"):
        spec = AttentionSpec(32, 32, 128, dtype, softmax_scale=128**-0.5, causal=True, varlen=True)
        try:
            choice = choose_backend(spec, device)
            lines.append(f"{dtype}: {choice.name} ({choice.reason})")
        except ValueError as error:
            lines.append(f"{dtype}: nothing ({error})")
    return lines


def quantisation() -> str:
    """Whether QLoRA and 8-bit optimizers can be had."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return 'bitsandbytes is not installed (for qlora and *_8bit optimizers: pip install "axo-flash[qlora]")'
    return "bitsandbytes is installed"


def fuse() -> str:
    """Whether the demo could make a FUSE mount, and which are there."""
    from axo_flash.demo import why_no_fuse

    mounts = fuse_mounts()
    can = why_no_fuse()
    text = "can be made (fusermount and rclone are there)" if can is None else f"cannot be made: {can}"
    return text + "".join(f"\n{line}" for line in mounts)


def fuse_mounts() -> list[str]:
    """The FUSE mounts of this system, as ``mount point (type)``; none where there is no /proc."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as table_of_mounts:
            lines = [line.split() for line in table_of_mounts]
    except OSError:
        return []
    types = [(fields[4], fields[fields.index("-") + 1]) for fields in lines]
    return [f"{point} ({kind})" for point, kind in types if kind.startswith("fuse.")]


# --------------------------------------------------------------------------------------------------------- the kernel


@dataclass
class Verdict:
    """Whether training can run with the kernels as they are, and what to say about them."""

    usable: bool
    text: str


def kernel_verdict() -> Verdict:
    """Run the kernels, forward and backward, against the fp32 reference: on the GPU those that serve it, else Triton's
    interpreted.

    Without Triton there is nothing to run: training goes through the reference itself.
    """
    import torch

    if importlib.util.find_spec("triton") is None:
        install = 'pip install "axo-flash[flash-attn]"'
        return Verdict(True, f"triton is not installed ({install}): the reference computes attention, slowly but right")
    names, where = ["triton"], "in Triton's interpreter (no GPU)"
    if torch.cuda.is_available():
        names, where = gpu_backends(), "on the GPU"
        if not names:  # auto takes the reference there, and says so
            return Verdict(True, "no kernel serves this GPU (see attention above for the reasons)")
        errors = {f"{name} {x}": e for name in names for x, e in kernel_errors("cuda", name).items()}
    else:
        errors = interpreted_errors()
    if isinstance(errors, str):
        return Verdict(False, f"triton failed {where}: {errors}")
    wrong = {name: f"{error:.1e} > {limit:.1e}" for name, (error, limit) in errors.items() if not error <= limit}
    if wrong:
        return Verdict(False, f"{' and '.join(names)}: wrong numbers {where}: {wrong}")
    worst = max(error / limit for error, limit in errors.values())
    agree = f"forward and backward of {' and '.join(names)} agree with the reference {where}"
    return Verdict(True, f"{agree} (largest error {worst:.0%} of the limit)")


def gpu_backends() -> list[str]:
    """The backends other than the reference that serve this GPU, best first."""
    import torch

    from axo_flash.kernels.backends import BACKENDS, choose_backend
    from axo_flash.kernels.spec import AttentionSpec

    spec = AttentionSpec(4, 2, 64, "float16", softmax_scale=0.125, causal=True)
    names = []
    for row in BACKENDS:
        try:
            names.append(choose_backend(spec, torch.device("cuda", torch.cuda.current_device()), row.name).name)
        except ValueError:
            continue
    return [name for name in names if name != "reference"]


def interpreted_errors() -> dict[str, tuple[float, float]] | str:
    """`kernel_errors` on the CPU in a process of its own (Triton reads TRITON_INTERPRET once), or why that failed."""
    program = "import json; from axo_flash.doctor import kernel_errors; print(json.dumps(kernel_errors('cpu')))"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    try:
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=environment, capture_output=True, text=True, timeout=KERNEL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer in {KERNEL_SECONDS} s"
    if result.returncode != 0:
        return (result.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return {name: tuple(pair) for name, pair in json.loads(result.stdout.splitlines()[-1]).items()}


def kernel_errors(device: str, backend: str = "triton") -> dict[str, tuple[float, float]]:
    """(error, limit) of out, dq, dk and dv of a backend on a small causal GQA problem.

    The error is the largest difference from the reference in fp32; the limit is 2x (out) or 3x (gradients) that of the
    same formula in plain fp16 PyTorch.
    """
    import torch

    from axo_flash.ops import flash_attn_func

    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(1, 97, heads, 64, generator=generator).to(device, torch.float16)

    q, k, v, dout = normal(4), normal(2), normal(2), normal(4)

    def run(attention: Callable, *tensors: torch.Tensor) -> list[torch.Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attention(*inputs)
        out.backward(dout.to(out.dtype))
        return [out.detach().float(), *(x.grad.float() for x in inputs)]

    exact = run(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True, backend="reference"), q.float(), k.float(), v.float()
    )
    ours = run(lambda q, k, v: flash_attn_func(q, k, v, causal=True, backend=backend), q, k, v)
    plain = run(plain_attention, q, k, v)
    errors = {}
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        slack = GRADIENT_SLACK if i else OUT_SLACK
        limit = slack * float((plain[i] - exact[i]).abs().max())
        errors[name] = (float((ours[i] - exact[i]).abs().max()), limit)
    return errors


def plain_attention(q, k, v):
    """Causal attention as one would write it, in the dtype of its inputs: the yardstick of rounding error."""
    import torch

    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)
