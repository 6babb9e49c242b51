"""Tile sizes by (kernel, architecture, padded head_dim): the first of each row is the default, all are autotuning candidates.

sm_90 was measured on an H100 (scripts/bench/NOTES.md); the others were chosen to fit shared memory and registers, and
tests/kernels/test_compile.py compiles them for each architecture.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """rows x cols (queries x keys) of a tile, warps of a program, stages of the load pipeline, and whether the tiles of
    the loop come through the copy engine (sm_90 and later)."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int
    tma: bool = False

    @property
    def options(self) -> dict:
        # multiply-adds stay fused whatever the default of the triton version is
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


INTERPRETER = {
    "forward": Config(32, 16, 4, 1),
    "delta": Config(32, 0, 4, 1),
    "dkdv": Config(16, 32, 4, 1),
    "dq": Config(32, 16, 4, 1),
}

# Shared memory a program may use, KiB: sm_75 64, sm_80 163, sm_86/89/120 99, sm_90/100 227.
_TABLE: dict[tuple[str, str], dict[int, list[Config]]] = {
    ("forward", "sm_90"): {
        64: [Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 64, 4, 3, tma=True)],
        128: [Config(128, 128, 8, 3), Config(64, 64, 4, 3, tma=True), Config(128, 64, 8, 3)],
        256: [Config(64, 64, 4, 3, tma=True), Config(64, 64, 8, 2, tma=True)],
    },
    ("dkdv", "sm_90"): {
        64: [Config(32, 64, 4, 3, tma=True), Config(128, 64, 4, 2, tma=True), Config(64, 64, 4, 3, tma=True)],
        128: [Config(64, 64, 4, 2, tma=True), Config(64, 128, 8, 3, tma=True), Config(32, 64, 4, 3, tma=True)],
        256: [Config(64, 64, 4, 2, tma=True), Config(32, 32, 8, 1, tma=True)],
    },
    ("dq", "sm_90"): {
        64: [Config(128, 64, 4, 3, tma=True), Config(64, 64, 4, 2, tma=True)],
        128: [Config(128, 64, 8, 3, tma=True), Config(64, 64, 4, 2, tma=True), Config(128, 128, 8, 2, tma=True)],
        256: [Config(64, 64, 4, 2, tma=True), Config(64, 32, 8, 2, tma=True)],
    },
    ("forward", "sm_80"): {
        64: [Config(128, 64, 4, 3), Config(128, 32, 4, 4)],
        128: [Config(128, 32, 8, 3), Config(64, 64, 4, 3)],
        256: [Config(64, 32, 8, 2), Config(64, 16, 4, 2)],
    },
    ("dkdv", "sm_80"): {
        64: [Config(64, 128, 8, 2), Config(64, 64, 4, 2)],
        128: [Config(32, 64, 4, 2), Config(64, 64, 8, 2)],
        256: [Config(32, 64, 8, 1)],
    },
    ("dq", "sm_80"): {
        64: [Config(128, 32, 8, 2), Config(64, 64, 4, 2)],
        128: [Config(128, 32, 8, 2), Config(64, 32, 4, 2)],
        256: [Config(64, 32, 8, 1)],
    },
    # 99 KiB: RTX 30, RTX 40, L4, RTX 50
    ("forward", "sm_86"): {
        64: [Config(128, 64, 4, 2), Config(64, 64, 4, 2)],
        128: [Config(128, 32, 4, 2), Config(64, 64, 4, 2)],
        256: [Config(64, 32, 4, 1)],
    },
    ("dkdv", "sm_86"): {
        64: [Config(64, 64, 4, 2), Config(64, 128, 8, 1)],
        128: [Config(32, 64, 4, 2), Config(32, 64, 4, 1)],
        256: [Config(16, 64, 8, 1)],
    },
    ("dq", "sm_86"): {
        64: [Config(64, 64, 4, 2)],
        128: [Config(64, 32, 4, 2)],
        256: [Config(64, 16, 8, 1)],
    },
    # 64 KiB, fp16 only: T4. Triton gives this architecture no tensor cores: small tiles of multiply-adds.
    ("forward", "sm_75"): {64: [Config(32, 32, 4, 1)], 128: [Config(32, 32, 4, 1)], 256: [Config(16, 16, 4, 1)]},
    ("dkdv", "sm_75"): {64: [Config(32, 32, 4, 1)], 128: [Config(16, 32, 4, 1)], 256: [Config(16, 16, 4, 1)]},
    ("dq", "sm_75"): {64: [Config(32, 32, 4, 1)], 128: [Config(32, 16, 4, 1)], 256: [Config(16, 16, 4, 1)]},
    # 64 KiB of LDS: MI200, MI300
    ("forward", "amd"): {64: [Config(128, 64, 4, 1)], 128: [Config(128, 64, 4, 1)], 256: [Config(64, 32, 4, 1)]},
    ("dkdv", "amd"): {64: [Config(32, 64, 4, 1)], 128: [Config(32, 64, 4, 1)], 256: [Config(16, 32, 4, 1)]},
    ("dq", "amd"): {64: [Config(64, 32, 4, 1)], 128: [Config(64, 32, 4, 1)], 256: [Config(32, 16, 4, 1)]},
}
_DELTA = Config(64, 0, 4, 1)
ARCHITECTURES = sorted({arch for _, arch in _TABLE})


def architecture(major: int, minor: int) -> str:
    """The row of the table for a CUDA compute capability."""
    if (major, minor) == (8, 0):
        return "sm_80"
    return {7: "sm_75", 8: "sm_86", 9: "sm_90", 10: "sm_90", 11: "sm_90", 12: "sm_86"}.get(major, "sm_86")


def candidates(kernel: str, arch: str, block_d: int) -> list[Config]:
    """The configurations to choose from; the first is the default."""
    return [_DELTA] if kernel == "delta" else _TABLE[kernel, arch][max(block_d, 64)]


def default(kernel: str, arch: str, block_d: int) -> Config:
    """What runs unless autotuning is asked for."""
    return candidates(kernel, arch, block_d)[0]
