"""Which entries of the softmax dropout keeps: the only definition, in PyTorch; kernels compute the same bits.

The mask is a function of a seed and of what an entry is, (key, query, head, sequence): not of tiles, strides or
whoever computes it. So the backward pass has the forward's mask, whatever the backend or its tile sizes. The function is
Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which is made for that, in seven rounds, the
fewest with which it passes the authors' tests of randomness.
"""

from __future__ import annotations

import torch

ROUNDS = 7
BITS = 24  # of the random number that are compared
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEYS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """Entries whose random number, of BITS bits, is below this are dropped."""
    return min(round(dropout_p * (1 << BITS)), (1 << BITS) - 1)


def draw_seed(device: torch.device) -> torch.Tensor:
    """An int64 (1,) from torch's default generator of the device, so that torch.manual_seed repeats it."""
    return torch.randint(0, 1 << 62, (1,), dtype=torch.int64, device=device)


def kept(seed: torch.Tensor, dropout_p: float, sequence, head, q_index, k_index) -> torch.Tensor:
    """bool, in the shape that the four indices (ints, or int64 tensors that broadcast) have together: True = kept.

    q_index and k_index count from the start of the sequence; `sequence` is the row of a dense batch, or the document.
    """
    sequence, head, q_index, k_index = (
        torch.as_tensor(x, dtype=torch.int64, device=seed.device) for x in (sequence, head, q_index, k_index)
    )
    return (_philox(seed, k_index, q_index, head, sequence) >> (32 - BITS)) >= threshold(dropout_p)


def _philox(seed, c0, c1, c2, c3):
    """The first of the four random words; words are the low 32 bits of int64."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        (high0, low0), (high2, low2) = _multiply(c0, _MULTIPLIERS[0]), _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    return c0


def _multiply(x, factor: int):
    """High and low word of the 64-bit product, by halves of x, as the whole would not fit a signed int64."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _LOW
