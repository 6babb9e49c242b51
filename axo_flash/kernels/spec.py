"""The one statement of what an attention call computes; every backend is judged against it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention call computes. Plain values only, so that a spec can be hashed, compared and printed.

    Args:
        num_heads, num_kv_heads: heads of q, and of k and v; query head `h` reads kv head `h // (num_heads // num_kv_heads)`.
        head_dim: length of one head's vector.
        dtype: of q, k, v and out ("bfloat16", "float16", "float32", "float64").
        softmax_scale: factor on q @ k^T before the softmax; positive.
        causal: a query sees no key after its own position, positions aligned at the bottom right.
        window_size: (left, right), inclusive: a query at position p sees keys p - left ... p + right; -1 = unlimited.
        varlen: q, k, v are (total, heads, head_dim) with cu_seqlens rather than (batch, seqlen, heads, head_dim).
        deterministic: dq must be bit-equal from run to run, as out, lse, dk and dv always are.
        softcap: scores become softcap * tanh(scores / softcap), before bias and mask; 0 = off.
        dropout_p: probability with which each entry of the softmax is dropped (`dropout.kept` says which); 0 = off.
        alibi: `alibi_bias` is added to the scores; the slopes come with the call.
        sinks: a logit a head, which comes with the call, joins the softmax's denominator, and so lse.

    Raises:
        ValueError: values that no attention can have, all of them together.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    softmax_scale: float
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    varlen: bool = False
    deterministic: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    alibi: bool = False
    sinks: bool = False

    def __post_init__(self):
        errors = []
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % max(self.num_kv_heads, 1):
            errors.append(
                f"num_heads must be a positive multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim < 1:
            errors.append(f"head_dim must be positive, got {self.head_dim}")
        if not (self.softmax_scale > 0 and math.isfinite(self.softmax_scale)):
            errors.append(f"softmax_scale must be positive and finite, got {self.softmax_scale}")
        if len(self.window_size) != 2 or any(w < -1 for w in self.window_size):
            errors.append(
                f"window_size must be (left, right), each -1 (unlimited) or the number of keys visible on that side, "
                f"got {self.window_size}"
            )
        if not (self.softcap >= 0 and math.isfinite(self.softcap)):
            errors.append(f"softcap must be 0 (off) or positive and finite, got {self.softcap}")
        if not 0 <= self.dropout_p < 1:
            errors.append(f"dropout_p must be at least 0 and below 1, got {self.dropout_p}")
        if errors:
            raise ValueError("attention: " + "; ".join(errors))

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def band(self) -> tuple[int, int]:
        """window_size with causal folded in: (left, right), -1 = unlimited."""
        left, right = self.window_size
        return left, 0 if self.causal else right

    def visible(self, q_index, k_index, seqlen_q: int, seqlen_k: int):
        """The mask: does query `q_index` see key `k_index`? The only definition of it.

        Ints give a bool, index tensors a broadcast bool tensor. The last query stands at the last key (bottom-right
        alignment), so with seqlen_q > seqlen_k the first queries of a causal call see nothing.
        """
        left, right = self.band
        distance = k_index - (q_index + seqlen_k - seqlen_q)
        seen = distance == distance
        if left >= 0:
            seen = seen & (distance >= -left)
        if right >= 0:
            seen = seen & (distance <= right)
        return seen

    def alibi_bias(self, q_index, k_index, seqlen_q: int, seqlen_k: int):
        """What ALiBi (Press et al. 2022) adds to a score, for a slope of 1: minus the distance of query and key."""
        return -abs(q_index + seqlen_k - seqlen_q - k_index)

    @property
    def extras(self) -> list[str]:
        """What is asked for beyond scale, mask and grouped heads, in flash-attn's words."""
        options = {"softcap": self.softcap, "dropout": self.dropout_p, "ALiBi": self.alibi, "sinks": self.sinks}
        return [name for name, on in options.items() if on]

    def aligned(self, multiple: int) -> AttentionSpec:
        """The same with head_dim rounded up, as columns of zeros change nothing."""
        return replace(self, head_dim=-(-self.head_dim // multiple) * multiple)
