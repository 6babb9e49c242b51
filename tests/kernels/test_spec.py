"""AttentionSpec: what it refuses, and its mask against flash-attn's and Hugging Face's words."""

import pytest

from axo_flash.kernels.spec import AttentionSpec


def spec(**changes):
    return AttentionSpec(
        **({"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "softmax_scale": 0.1} | changes)
    )


def mask(seqlen_q, seqlen_k, **changes):
    s = spec(**changes)
    return ["".join(str(int(s.visible(i, j, seqlen_q, seqlen_k))) for j in range(seqlen_k)) for i in range(seqlen_q)]


def test_causal_is_aligned_bottom_right():
    assert mask(2, 5, causal=True) == ["11110", "11111"]
    assert mask(5, 2, causal=True) == ["00", "00", "00", "10", "11"]


def test_window_is_inclusive():
    assert mask(4, 4, window_size=(1, 0)) == ["1000", "1100", "0110", "0011"]
    assert mask(4, 4, window_size=(0, 1)) == ["1100", "0110", "0011", "0001"]
    assert mask(4, 4, window_size=(1, 2), causal=True) == ["1000", "1100", "0110", "0011"]
    assert mask(3, 3) == ["111"] * 3


def test_specs_are_keys():
    assert spec() == spec() and len({spec(), spec(), spec(causal=True)}) == 2
    assert spec(causal=True, window_size=(7, 9)).band == (7, 0)
    assert spec().group_size == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, "multiple of num_kv_heads, got 5 and 2"),
        ({"num_kv_heads": 0}, "multiple of num_kv_heads"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be positive"),
        ({"window_size": (-2, 0)}, "window_size must be"),
        ({"head_dim": 0}, "head_dim must be positive"),
        ({"softcap": float("inf")}, "softcap must be 0 .off. or positive and finite, got inf"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
    ],
)
def test_refuses_what_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        spec(**changes)


def test_names_all_errors_at_once():
    with pytest.raises(ValueError, match=r"num_heads.*head_dim.*softmax_scale"):
        spec(num_heads=5, head_dim=-1, softmax_scale=-1.0)


def test_alibi_is_minus_the_distance_from_the_querys_place():
    assert [[spec().alibi_bias(i, j, 2, 4) for j in range(4)] for i in range(2)] == [[-2, -1, 0, -1], [-3, -2, -1, 0]]


def test_head_dim_is_rounded_up():
    assert [spec(head_dim=d).aligned(8).head_dim for d in (1, 59, 64, 111)] == [8, 64, 64, 112]
    assert spec().aligned(8) == spec()


def test_extras_are_named():
    assert spec(softcap=1.0, dropout_p=0.1, alibi=True, sinks=True).extras == ["softcap", "dropout", "ALiBi", "sinks"]
    assert spec(causal=True, window_size=(1, 0)).extras == []
