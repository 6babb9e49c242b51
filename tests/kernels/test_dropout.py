"""The dropout mask: Philox by its authors' own test vectors, and how often it drops."""

import pytest
import torch

from axo_flash.kernels import dropout


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


# Random123's kat_vectors: philox4x32 with 7 rounds; four words of counter, two of key, the first word of the result
@pytest.mark.parametrize(
    ("counter", "key", "word"),
    [
        ((0,) * 4, (0, 0), 0x5F6FB709),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), 0x5207DDC2),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0x4DFCCABA),
    ],
)
def test_the_generator_is_philox(counter, key, word):
    seed = torch.tensor([_signed(key[1] << 32 | key[0])])
    assert dropout._philox(seed, *(torch.tensor([c]) for c in counter)).item() == word


@pytest.mark.parametrize("dropout_p", [0.0, 0.17, 0.5, 0.99])
def test_drops_as_often_as_asked_everywhere(dropout_p):
    """Of each head of each sequence, and each row and column."""
    index = torch.arange(400)
    sequence, head = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None]
    kept = dropout.kept(torch.tensor([123]), dropout_p, sequence, head, index[:, None], index)
    assert kept.shape == (2, 3, 400, 400)
    for dims, entries in (((2, 3), 400 * 400), ((0, 1, 3), 2400), ((0, 1, 2), 2400)):
        deviation = (dropout_p * (1 - dropout_p) / entries) ** 0.5
        assert ((~kept).double().mean(dims) - dropout_p).abs().max() <= 4.5 * deviation


def test_seeds_heads_and_sequences_differ():
    index = torch.arange(50)

    def mask(seed=1, sequence=0, head=0):
        return dropout.kept(torch.tensor([seed]), 0.5, sequence, head, index[:, None], index)

    others = [mask(seed=2), mask(seed=1 << 40), mask(sequence=1), mask(head=1), mask().T]
    for other in others:
        assert 0.4 < (mask() == other).double().mean() < 0.6


def test_the_smallest_and_the_largest_probability():
    assert dropout.threshold(1e-9) == 0
    assert dropout.threshold(1 - 1e-9) == (1 << dropout.BITS) - 1
