import pytest
import torch
from hypothesis import given
from laws import examples
from patterned import SIZES, made

from retrieval_attn.kernels.sparse.coverage import Layout
from retrieval_attn.kernels.sparse.probes import (
    CHECK,
    FIT,
    N_FIRST,
    N_NEAR,
    attend_probes,
    look,
    probe_rows,
    sum_diagonals,
)


def causal_softmax(query, keys):
    T, S = query.shape[1], keys.shape[1]
    scores = query @ keys.repeat_interleave(len(query) // len(keys), 0).mT * 0.25
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf).softmax(-1)


@given(**SIZES)
@examples(60)
def test_probes_and_their_diagonals_are_those_of_the_attention_matrix(T, past, R, seed):
    query, keys = made(T, T + past, R, seed)
    rows = torch.arange(max(0, T - 64), T)
    exact = causal_softmax(query, keys)[:, rows]
    probes = attend_probes(query, keys, 0.25, rows)
    torch.testing.assert_close(probes, exact)
    sums = torch.zeros(len(query), T + past)
    for i, row in enumerate(rows.tolist()):
        own = past + row
        sums[:, : own + 1] += exact[:, i, : own + 1].flip(1)
    torch.testing.assert_close(sum_diagonals(probes), sums)


@given(**SIZES)
@examples(60)
def test_what_is_seen_is_the_attention_matrix_without_what_is_always_read(T, past, R, seed):
    query, keys = made(T, T + past, R, seed)
    layout = Layout(T, T + past)
    seen = look(query, keys, 0.25, layout, torch.full((100 * layout.S * len(query),), torch.nan))
    exact = causal_softmax(query, keys)[:, seen.rows]
    torch.testing.assert_close(seen.best, exact.amax(2))
    block = (torch.arange(layout.S) - layout.first_key) // 64
    for i, row in enumerate(seen.rows.tolist()):
        assert seen.own[i] == block[past + row]
        assert seen.runs[i] == row // 64
        exact[:, i, block >= seen.own[i] - N_NEAR] = 0
    exact[:, :, :N_FIRST] = 0
    torch.testing.assert_close(seen.probes, exact)
    torch.testing.assert_close(seen.missing, exact.sum(2))
    sums = torch.zeros(*exact.shape[:2], layout.n_blocks).index_add_(2, block, exact)
    torch.testing.assert_close(seen.blocks, sums)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 512, 2048, 5000])
def test_probes_are_spread_and_stand_at_both_ends_of_blocks(T):
    rows = probe_rows(T, max(2, min(64, T // 32)), 64)
    assert ((rows >= 0) & (rows < T)).all()
    if T >= 2048:
        places = rows % 64
        assert set(places[FIT].tolist()) == {2, 61}
        assert places[CHECK].min() < 8
        assert places[CHECK].max() > 55
        assert rows.diff().abs().max() < 4 * T / 64
