import pytest
import torch
from coverage_checks import assert_named_once
from hypothesis import given
from hypothesis import strategies as st
from laws import examples

from retrieval_attn.kernels import reference
from retrieval_attn.kernels.sparse.coverage import Coverage, Layout, list_blocks, list_coverage, stack_heads

SHAPES = [(16, 16), (64, 16), (64, 64)]

SIZES = {"T": st.integers(1, 200), "past": st.integers(0, 200), "shape": st.sampled_from(SHAPES)}


@given(**SIZES, seed=st.integers(0, 999), n_columns=st.integers(0, 30))
def test_every_run_reads_the_diagonals_and_the_columns_and_nothing_else(T, past, shape, seed, n_columns):
    make = torch.Generator().manual_seed(seed)
    layout = Layout(T, T + past, *shape)
    S, width = layout.S, layout.width
    diagonals = torch.rand((2, layout.n_blocks), generator=make) < 0.3
    columns = torch.stack([torch.randperm(S + 5, generator=make)[:n_columns] for _ in range(2)])
    index = list_coverage(Coverage(diagonals, columns), layout)
    assert_named_once(index, S)
    # By brute force: query i of a run reads block b at the distance of their blocks, for some query of the run.
    block = (torch.arange(S) - layout.first_key) // width
    listed = reference.listed_keys(index, S)[0]
    for h in range(2):
        for n in range(layout.n_runs):
            first = past + n * layout.rows
            wanted = torch.zeros(S, dtype=torch.bool)
            for own in range(layout.rows // width):
                distance = (first - layout.first_key) // width + own - block
                inside = (distance >= 0) & (distance < layout.n_blocks)
                wanted |= inside & diagonals[h, distance.clamp(0, layout.n_blocks - 1)]
            wanted[columns[h][columns[h] < min(S, first + layout.rows)]] = True
            assert torch.equal(listed[h, n], wanted)


@given(**SIZES, seed=st.integers(0, 999))
@examples(50)
def test_blocks_chosen_run_by_run(T, past, shape, seed):
    layout = Layout(T, T + past, *shape)
    reads = torch.rand((2, layout.n_runs, layout.n_blocks), generator=torch.Generator().manual_seed(seed)) < 0.4
    index = list_blocks(reads, layout)
    assert_named_once(index, layout.S)
    block = (torch.arange(layout.S) - layout.first_key) // layout.width
    assert torch.equal(reference.listed_keys(index, layout.S)[0], reads[:, :, block])


def test_heads_are_put_where_they_belong_and_the_others_read_nothing():
    layout = Layout(100, 150)
    some = list_coverage(Coverage(torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1, 7], [9, 150]])), layout)
    other = list_blocks(torch.ones(1, 2, 3, dtype=torch.bool), layout)
    whole = stack_heads([([3, 0], some), ([1], other)], 4)
    listed = reference.listed_keys(whole, 150)[0]
    assert torch.equal(listed[[3, 0]], reference.listed_keys(some, 150)[0])
    assert torch.equal(listed[[1]], reference.listed_keys(other, 150)[0])
    assert not listed[2].any()


@pytest.mark.parametrize(("T", "S"), [(1, 1), (64, 64), (63, 1000), (65, 65)])
def test_a_layout_covers_every_key(T, S):
    layout = Layout(T, S)
    assert -layout.width < layout.first_key <= 0
    assert layout.first_key + layout.n_blocks * layout.width >= S
    assert (layout.past - layout.first_key) % layout.width == 0
