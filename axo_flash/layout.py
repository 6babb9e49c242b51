"""Which tokens of a batch attend together: padding masks and restarting positions become one varlen layout.

A padded row, a packed row and a row that is both are the same thing to a varlen kernel: sequences laid end to end. This
module finds them from what a model knows, a mask of real tokens (batch, seqlen_k) and position_ids (batch, seqlen_q).
The queries are always the last columns of the mask. Everything is worked out on the device; in eager mode the host
reads five numbers, once for all the layers of a forward. While torch.compile traces, it reads nothing: with fullgraph=True
the documents are found by an operator, `axo_flash::documents`, whose result has a size that only the run knows; what would
have been refused, and packed rows where such an operator would break the graph, become an assertion in the graph.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass

import torch

from axo_flash.varlen import cu_seqlens_from_lengths


@dataclass(frozen=True)
class Layout:
    """How (batch, seqlen, ...) tensors become sequences laid end to end.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,).
        q_indices, k_indices: rows of the flattened (batch * seqlen, ...) tensors that hold tokens, those of a sequence
            side by side; None = all of them, in their order. While tracing, the rows of padding follow the tokens, so
            that shapes do not depend on values.
        packed: a row holds more than one document.
        holes: a row has padding between tokens, so that distances in the row and in the sequence differ.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    q_indices: torch.Tensor | None = None
    k_indices: torch.Tensor | None = None
    packed: bool = False
    holes: bool | torch.Tensor = False


def find_layout(
    mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, seqlen_q: int, seqlen_k: int, device
) -> Layout | None:
    """The layout of a batch; None if every row is one sequence without padding, which needs none.

    A document starts wherever a token's position is not its left neighbour's plus one; across padding, wherever the
    position does not grow. So a mask of ones changes nothing, the positions that `generate` gives to left padding start
    nothing, and rows that are packed and padded keep their documents apart.

    Args:
        mask: bool (batch, seqlen_k), True = token, or None = all of them.
        position_ids: integers (batch or 1, seqlen_q), or None = consecutive.

    Raises:
        ValueError: positions restart among queries that also see cached keys, whose documents nobody knows.
    """
    if mask is None and (position_ids is None or seqlen_q == 1):
        return None
    if torch.compiler.is_compiling():
        return _traced_layout(mask, position_ids, batch, seqlen_q, seqlen_k, device)
    tensors = [t for t in (mask, position_ids) if t is not None]
    if any(t.is_inference() for t in tensors):  # such tensors do not count their changes, so nothing may be remembered
        return _eager_layout(mask, position_ids, batch, seqlen_q, seqlen_k, device)
    key = (mask is None, batch, seqlen_q, seqlen_k, str(device), *(t._version for t in tensors))
    for known, refs, layout in _recent:
        if known == key and all(ref() is t for ref, t in zip(refs, tensors, strict=True)):
            return layout
    layout = _eager_layout(mask, position_ids, batch, seqlen_q, seqlen_k, device)
    _recent.append((key, [weakref.ref(t) for t in tensors], layout))
    return layout


# Layouts of the last few forwards, found by the identity of the tensors that they came from: the layers of one forward
# share theirs, and so does the recomputation under gradient checkpointing.
_recent: deque = deque(maxlen=4)


_PACKED_AND_CACHED = (
    "position_ids restart among queries that also see cached keys; packed rows cannot be continued from a KV cache, as "
    "nothing says which cached keys belong to which document: run packed rows without past_key_values, or one document "
    "a row"
)
_PACKED_AND_COMPILED = (
    "position_ids restart (packed rows) in a compiled forward, which cannot read them: compile with fullgraph=True, or "
    "also pass cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k, as packing collators do"
)


def _eager_layout(mask, position_ids, batch, seqlen_q, seqlen_k, device) -> Layout | None:
    tokens = _Tokens(mask, position_ids, batch, seqlen_q, seqlen_k, device)
    facts = [tokens.q.sum(), tokens.k.sum(), tokens.starts.sum(), tokens.restarts.any(), tokens.holes.any()]
    num_q, num_k, num_documents, packed, holes = torch.stack([fact.long() for fact in facts]).tolist()  # the one wait
    padded_q, padded_k = num_q < batch * seqlen_q, num_k < batch * seqlen_k
    if packed and seqlen_q != seqlen_k:
        raise ValueError(f"attention: {seqlen_q} queries see {seqlen_k} keys, and {_PACKED_AND_CACHED}")
    if not (packed or padded_q or padded_k):
        return None
    if packed:
        lengths_q = lengths_k = tokens.document_lengths(num_documents)
    else:
        lengths_q, lengths_k = tokens.q.sum(-1), tokens.k.sum(-1)
    q_indices = _tokens_first(tokens.q)[:num_q] if padded_q else None
    k_indices = _tokens_first(tokens.k)[:num_k] if padded_k else None
    cu_seqlens_q, cu_seqlens_k = (cu_seqlens_from_lengths(lengths) for lengths in (lengths_q, lengths_k))
    return Layout(cu_seqlens_q, cu_seqlens_k, q_indices, k_indices, bool(packed), bool(holes))


def _traced_layout(mask, position_ids, batch, seqlen_q, seqlen_k, device) -> Layout | None:
    tokens = _Tokens(mask, position_ids, batch, seqlen_q, seqlen_k, device)
    if position_ids is not None and seqlen_q == seqlen_k > 1 and _sizes_may_depend_on_values():
        cu_seqlens_q = cu_seqlens_k = torch.ops.axo_flash.documents(mask, position_ids, batch, seqlen_q)
    else:
        if position_ids is not None and seqlen_q > 1:
            reason = _PACKED_AND_COMPILED if seqlen_q == seqlen_k else _PACKED_AND_CACHED
            torch._assert_async(~tokens.restarts.any(), f"attention: {reason}")
        if mask is None:
            return None
        cu_seqlens_q, cu_seqlens_k = (cu_seqlens_from_lengths(valid.sum(-1)) for valid in (tokens.q, tokens.k))
    q_indices, k_indices = (None if mask is None else _tokens_first(valid) for valid in (tokens.q, tokens.k))
    return Layout(cu_seqlens_q, cu_seqlens_k, q_indices, k_indices, holes=tokens.holes.any())


def _tokens_first(valid: torch.Tensor) -> torch.Tensor:
    """Indices of the flattened `valid`: of the True ones, then of the others, each in order. Its size is fixed."""
    return valid.flatten().to(torch.uint8).argsort(descending=True, stable=True)


class _Tokens:
    """Boolean tensors about the tokens of a batch, none of them read by the host.

    q (batch, seqlen_q), k (batch, seqlen_k): is a token, not padding. Among the queries that are tokens, `starts`: the
    first of a document; `restarts`: the first of a document that is not the first of its row. `holes` (batch,
    seqlen_k): a token after padding after a token.
    """

    def __init__(self, mask, position_ids, batch, seqlen_q, seqlen_k, device):
        everything = torch.ones((), dtype=torch.bool, device=device)
        self.k = everything.expand(batch, seqlen_k) if mask is None else mask.to(device=device, dtype=torch.bool)
        if seqlen_q == 1:  # the newest token, which stands wherever the empty tail of a static cache begins
            self.q = everything.expand(batch, 1)
        else:
            self.q = self.k[:, -seqlen_q:]
        before = _previous(self.k)
        self.holes = self.k & (before >= 0) & (before < _columns(self.k) - 1)
        before = _previous(self.q)
        has_before = before >= 0
        if position_ids is None:
            self.restarts = torch.zeros_like(self.q)
        else:
            positions = position_ids.to(device).expand(batch, seqlen_q)
            step = positions - positions.gather(1, before.clamp_min(0))
            adjacent = before == _columns(self.q) - 1
            self.restarts = self.q & has_before & torch.where(adjacent, step != 1, step <= 0)
        self.starts = self.q & (~has_before | self.restarts)

    def document_lengths(self, num_documents: int) -> torch.Tensor:
        """Tokens of each document, in order, int32 (num_documents,)."""
        document = (self.starts.flatten().cumsum(0) - 1).clamp_min(0)  # padding before the first counts as 0 tokens
        lengths = torch.zeros(num_documents, dtype=torch.int32, device=document.device)
        return lengths.index_add_(0, document, self.q.flatten().to(torch.int32))


def _columns(valid: torch.Tensor) -> torch.Tensor:
    return torch.arange(valid.shape[1], device=valid.device)


def _previous(valid: torch.Tensor) -> torch.Tensor:
    """For each column the last earlier one that is True, or -1. (batch, seqlen) int64."""
    last = torch.where(valid, _columns(valid), -1).cummax(1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)


# --- the operator of a compiled forward -----------------------------------------------------------------------------

_library = torch.library.Library("axo_flash", "FRAGMENT")
# its host waits for the device, which no CUDA graph can record
_library.define(
    "documents(Tensor? mask, Tensor position_ids, SymInt batch, SymInt seqlen) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@torch.compiler.assume_constant_result
def _sizes_may_depend_on_values() -> bool:
    """Whether an operator with such a result can stand in the graph that is traced, and would not break it: with
    fullgraph=True, or by torch._dynamo.config.capture_dynamic_output_shape_ops."""
    context = torch._guards.TracingContext.try_get()
    fake_mode = context.fake_mode if context is not None else None
    return bool(fake_mode and fake_mode.shape_env and fake_mode.shape_env.allow_dynamic_output_shape_ops)


def _documents(mask, position_ids, batch: int, seqlen: int) -> torch.Tensor:
    """cu_seqlens of the documents in (batch, seqlen), or of one that is empty if there is none."""
    tokens = _Tokens(mask, position_ids, batch, seqlen, seqlen, position_ids.device)
    return cu_seqlens_from_lengths(tokens.document_lengths(max(int(tokens.starts.sum()), 1)))


def _documents_fake(mask, position_ids, batch, seqlen):
    return position_ids.new_empty(torch.library.get_ctx().new_dynamic_size(min=2), dtype=torch.int32)


_library.impl("documents", _documents, "CompositeExplicitAutograd")
torch.library.register_fake("axo_flash::documents", _documents_fake, lib=_library)
