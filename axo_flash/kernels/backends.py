"""The table of backends, best first, and the choice among them. A new backend is a row here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from axo_flash.kernels.spec import AttentionSpec


@dataclass(frozen=True)
class Backend:
    """One row: `module` has supports(spec, device) -> None | reason, forward(...) -> (out, lse) and
    backward(...) -> (dq, dk, dv), with dsinks behind them if the spec has sinks. It is imported at first use (`requires`
    is what that import needs). It is called with head_dim rounded up to a multiple of `align`, zeros in the columns added.
    """

    name: str
    module: str
    requires: str = "torch"
    install: str = ""
    align: int = 1


BACKENDS = (
    Backend("hopper", "axo_flash.kernels.hopper", align=8),
    Backend(
        "triton", "axo_flash.kernels.triton", requires="triton", install='pip install "axo-flash[flash-attn]"', align=8
    ),
    Backend("reference", "axo_flash.kernels.reference"),
)


@dataclass(frozen=True)
class Choice:
    """The backend that serves a spec, and why (for `auto`: what is wrong with each better one); `spec` is what it is to be
    called with: head_dim as the backend wants it."""

    name: str
    module: ModuleType | None
    reason: str
    spec: AttentionSpec | None = None


def choose_backend(spec: AttentionSpec, device: torch.device, name: str = "auto") -> Choice:
    """The first backend of BACKENDS that computes `spec` on `device`, with what is wrong with each better one.

    Args:
        name: "auto", or the name of the backend that must serve.

    Raises:
        ValueError: no such backend, or none that can serve; names every reason.
    """
    rows = BACKENDS if name == "auto" else [row for row in BACKENDS if row.name == name]
    if not rows:
        raise ValueError(
            f"unknown attention backend {name!r}: choose 'auto' or one of {[row.name for row in BACKENDS]}"
        )
    refused = []
    for row in rows:
        module, reason = _load(row)
        aligned = spec.aligned(row.align)
        reason = reason or module.supports(aligned, device)
        if reason is None:
            why = "; ".join(refused) or ("asked for by name" if name != "auto" else "the best there is")
            return Choice(row.name, module, why, aligned)
        refused.append(f"not {row.name}: {reason}")
    raise ValueError(f"no attention backend can serve this call ({'; '.join(refused)}) for {spec} on {device}")


def _load(row: Backend) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(row.module), None
    except ModuleNotFoundError as error:
        if error.name != row.requires:
            raise
        return None, f"the package {row.requires} is not installed: {row.install}"
