"""What `flash_attn.layers.rotary` is mostly asked for: the rotary embedding of one tensor, in PyTorch."""

from __future__ import annotations

import torch

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func"]


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rotate the first rotary_dim values of every head by the angle of its position (Su et al. 2021), in fp32.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens.
        cos, sin: (positions, rotary_dim / 2).
        interleaved: neighbours are pairs (GPT-J), rather than the halves (GPT-NeoX, Llama).
        inplace: write the result into x, and return that.
        seqlen_offsets: position of the first token, of all sequences or of each, (batch,).
        cu_seqlens: int32 (batch + 1,); tokens past its end are left as they are.
        max_seqlen: of flash-attn's signature; not needed.

    Raises:
        ValueError: cos and sin that differ in shape, more rotary_dim than head_dim, or fewer positions than tokens.
    """
    half, seqlen = cos.shape[-1], x.shape[-3]
    if cos.shape != sin.shape or 2 * half > x.shape[-1]:
        raise ValueError(
            f"apply_rotary_emb: cos and sin must be (positions, up to {x.shape[-1] // 2}), got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if cu_seqlens is None and isinstance(seqlen_offsets, int) and seqlen + seqlen_offsets > cos.shape[0]:
        raise ValueError(
            f"apply_rotary_emb: cos and sin have {cos.shape[0]} positions, for tokens at {seqlen_offsets} ... "
            f"{seqlen + seqlen_offsets - 1}"
        )
    token = torch.arange(seqlen, device=x.device)
    if cu_seqlens is None:
        position = token + torch.as_tensor(seqlen_offsets, device=x.device)[..., None]
        turned = torch.ones_like(token, dtype=torch.bool)
    else:
        sequence = torch.searchsorted(cu_seqlens[1:], token, right=True, out_int32=True)
        turned = sequence < cu_seqlens.numel() - 1
        sequence = sequence.clamp_max(cu_seqlens.numel() - 2)
        position = token - cu_seqlens[sequence]
        position += seqlen_offsets if isinstance(seqlen_offsets, int) else seqlen_offsets[sequence]
        position = position.masked_fill(~turned, 0)
    cos, sin = (
        t[position].float()[..., None, :] for t in (cos, sin)
    )  # (batch or 1, seqlen, 1, half), or (total, 1, half)
    cos, sin = cos.where(turned[:, None, None], 1), sin.where(turned[:, None, None], 0)
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = rotary[..., ::2].float(), rotary[..., 1::2].float()
    else:
        first, second = (part.float() for part in rotary.chunk(2, -1))
    rotated = (first * cos - second * sin, first * sin + second * cos)
    rotated = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    out = torch.cat([rotated.to(x.dtype), rest], -1)
    return x.copy_(out) if inplace else out


apply_rotary_emb_func = apply_rotary_emb
