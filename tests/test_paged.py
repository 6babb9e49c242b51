"""Keys and values in pages: the result and the gradients of the same ones in one piece."""

import pytest
import torch

from axo_flash import flash_attn_varlen_func

PAGE, LENGTHS_Q, LENGTHS_K = 16, [5, 0, 33, 7, 20], [40, 9, 33, 0, 32]


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def paged_inputs(dtype=torch.int32, seed=0):
    """q, pages of k and v, block_table, and k and v as they are in one piece. Pages lie in no order, two sequences share
    one, and behind a sequence's last page the table holds numbers of no page."""
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-n // PAGE) for n in LENGTHS_K]
    table = torch.full((len(LENGTHS_K), max(pages_of) + 1), -7, dtype=dtype)
    numbers = torch.randperm(sum(pages_of) + 3, generator=generator).to(dtype)
    for i, n in enumerate(pages_of):
        table[i, :n] = numbers[sum(pages_of[:i]) : sum(pages_of[:i]) + n]
    table[4, 0] = table[0, 0]  # of one prefix
    q = torch.randn(sum(LENGTHS_Q), 4, 32, generator=generator, requires_grad=True)
    k, v = (torch.randn(len(numbers), PAGE, 2, 32, generator=generator, requires_grad=True) for _ in range(2))
    one_piece = []
    for pages in (k, v):
        rows = [pages[table[i, :n].long()].flatten(0, 1) for i, n in enumerate(pages_of)]
        one_piece.append(torch.cat([x[:length] for x, length in zip(rows, LENGTHS_K, strict=True)]))
    return q, k, v, table, one_piece


@pytest.mark.parametrize("max_seqlen_k", [None, 40, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pages_are_what_lies_in_them(dtype, max_seqlen_k):
    q, k, v, table, one_piece = paged_inputs(dtype)
    cu = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    options = dict(causal=True, window_size=(30, -1))
    want = flash_attn_varlen_func(q, *one_piece, *cu, **options)
    out = flash_attn_varlen_func(q, k, v, *cu, 33, max_seqlen_k, block_table=table, **options)
    assert torch.equal(out, want)
    dout = torch.randn_like(out)
    for got, expected in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, want)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            dict(k=torch.zeros(3, 2, 32)),
            r"k and v must be \(num_pages, page_size, num_kv_heads, head_dim\), got \(3, 2, 32\)",
        ),
        (
            dict(block_table=torch.zeros(5, 3)),
            r"block_table must be int32 or int64 .* batch 5, got torch.float32 \(5, 3\)",
        ),
        (dict(block_table=torch.zeros(4, 3, dtype=torch.int32)), r"with batch 5, got torch.int32 \(4, 3\)"),
        (
            dict(block_table=torch.zeros(5, 3, dtype=torch.int32, device="meta")),
            "q, k, v and block_table must be on one device, got cpu, cpu, cpu, meta",
        ),
        (dict(v=torch.zeros(12, PAGE, 2, 32, device="meta")), "on one device, got cpu, cpu, meta, cpu"),
        (dict(max_seqlen_k=65), "max_seqlen_k is 65, but block_table has 4 pages of 16 a sequence"),
    ],
)
def test_refuses_what_does_not_fit(change, words):
    q, k, v, table, _ = paged_inputs()
    arguments = dict(q=q, k=k, v=v, cu_seqlens_q=cumulative(LENGTHS_Q), cu_seqlens_k=cumulative(LENGTHS_K))
    with pytest.raises(ValueError, match=words):
        flash_attn_varlen_func(**arguments | dict(block_table=table) | change)


def test_compiles_without_a_graph_break():
    q, k, v, table, _ = paged_inputs()
    cu = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)

    def attend(q, k, v, table):
        return flash_attn_varlen_func(q, k, v, *cu, 33, 40, causal=True, block_table=table)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, table), attend(q, k, v, table))
