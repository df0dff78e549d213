import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import examples
from patterned import RATIOS, SIZES, made

from retrieval_attn.kernels import HeadPattern, reference
from retrieval_attn.kernels.sparse.coverage import Layout
from retrieval_attn.kernels.sparse.patterns import (
    FIRST_COLUMNS,
    NEAREST_SLASHES,
    check_patterns,
    fixed_index,
    score_blocks,
)


def listed(pattern, query, keys, layout):
    return reference.listed_keys(fixed_index(query, keys, 0.25, pattern, layout), layout.S)[0]


@given(**SIZES, kind=st.sampled_from(["a_shape", "vertical_slash", "block_sparse"]))
@examples(60)
def test_a_full_budget_is_dense(T, past, R, seed, kind):
    layout = Layout(T, T + past)
    reads = listed(HeadPattern(kind, 1 << 20, 1 << 20), *made(T, layout.S, R, seed), layout)
    for n, start in enumerate(layout.run_starts().tolist()):
        assert reads[:, n, : start + layout.rows].all()


@given(**SIZES, sink=st.integers(0, 100), local=st.integers(0, 100))
@examples(60)
def test_a_shape_reads_the_first_and_the_last_tokens(T, past, R, seed, sink, local):
    layout = Layout(T, T + past)
    reads = listed(HeadPattern("a_shape", sink, local), *made(T, layout.S, R, seed), layout)
    position = torch.arange(layout.S)
    for t in range(T):
        own = past + t
        wanted = (position <= own) & ((position < sink) | (position >= own - local))
        assert reads[:, t // layout.rows, wanted].all()
        far = (position >= sink) & (position < own - local - 2 * layout.width)
        assert not reads[:, t // layout.rows, far].any()


@pytest.mark.parametrize("R", RATIOS)
@pytest.mark.parametrize("past", [0, 37, 300])
def test_vertical_slash_reads_the_best_columns_and_diagonals(R, past):
    """A key that every query wants, and a distance that every query looks at, are found beside the forced ones."""
    T, S = 200, 200 + past
    query, keys = made(T, S, R, 0, D=32)
    query, keys = 0.1 * query, 0.1 * keys
    query[..., 0] = 4
    keys[:, 41, 0] = 8
    for t in range(T):
        phase = torch.tensor(0.9 * (past + t))
        query[:, t, 2], query[:, t, 3] = 6 * phase.cos(), 6 * phase.sin()
    for s in range(S):
        phase = torch.tensor(0.9 * (s + 130))
        keys[:, s, 2], keys[:, s, 3] = 3 * phase.cos(), 3 * phase.sin()
    layout = Layout(T, S)
    reads = listed(HeadPattern("vertical_slash", FIRST_COLUMNS + 1, NEAREST_SLASHES + 1), query, keys, layout)
    assert reads[:, -1, 41].all()
    for t in range(T):
        own = past + t
        assert reads[:, t // 64, max(0, own - NEAREST_SLASHES + 1) : own + 1].all()
        assert reads[:, t // 64, : min(FIRST_COLUMNS, own + 1)].all()


def test_the_last_queries_say_what_all_read():
    """As the question at the end of a prompt does."""
    query, keys = torch.zeros(1, 200, 16), 0.1 * torch.randn(1, 700, 16)
    query[0, :64, 0] = query[0, -64:, 1] = 20
    keys[0, 200, 0] = keys[0, 300, 1] = 20
    layout = Layout(200, 700)
    reads = listed(HeadPattern("vertical_slash", FIRST_COLUMNS + 1, 0), query, keys, layout)
    assert reads[0, :, 300].all()
    assert not reads[0, :, 200].any()


@given(**SIZES, n_best=st.integers(1, 6))
@examples(60)
def test_block_sparse_reads_the_best_means(T, past, R, seed, n_best):
    layout = Layout(T, T + past)
    query, keys = made(T, layout.S, R, seed)
    reads = listed(HeadPattern("block_sparse", n_best), query, keys, layout)
    block = (torch.arange(layout.S) - layout.first_key) // 64
    for n in range(layout.n_runs):
        own = layout.n_before + n
        mean = query[:, n * 64 : (n + 1) * 64].mean(1)
        scores = torch.full((len(query), layout.n_blocks), -torch.inf)
        for b in range(own + 1):
            forced = layout.first_key + 64 * b < 64 or b >= own - 1
            centre = keys[:, block == b].mean(1).repeat_interleave(R, 0)
            scores[:, b] = torch.inf if forced else (mean * centre).sum(1) * 0.25
        for h in range(len(query)):
            found = set(block[reads[h, n]].tolist())
            must = {b for b in range(own + 1) if layout.first_key + 64 * b < 64 or b >= own - 1}
            best = scores[h].argsort(descending=True, stable=True)[:n_best].tolist()
            assert must <= found <= must | {b for b in range(own + 1) if scores[h, b] >= scores[h, best[-1]] - 1e-5}
            assert len(found) == min(own + 1, max(n_best, len(must)))


def test_a_run_does_not_score_what_it_does_not_see():
    layout = Layout(200, 300)
    scores = score_blocks(*made(200, 300, 1, 0), 0.25, layout)
    own = layout.n_before + torch.arange(layout.n_runs)
    assert torch.equal((scores == -torch.inf)[0], torch.arange(layout.n_blocks) > own[:, None])


def test_bad_patterns_are_named():
    with pytest.raises(ValueError, match=r"one pattern per query head \(4\), got 1"):
        check_patterns([HeadPattern("dense")], 4)
    with pytest.raises(ValueError, match="head 1: kind must be one of a_shape, .* got 'x'"):
        check_patterns([HeadPattern("dense"), HeadPattern("x")], 2)
    with pytest.raises(ValueError, match="head 0: sizes must be at least 0, got -1 and 5"):
        check_patterns([HeadPattern("a_shape", -1, 5)], 1)
