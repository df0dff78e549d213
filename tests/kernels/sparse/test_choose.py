import pytest
import torch
from chosen_heads import D, S, T, left_out, made, single_needles

from retrieval_attn.kernels import reference
from retrieval_attn.kernels.sparse.choose import choose
from retrieval_attn.kernels.sparse.coverage import Layout, stack_heads
from retrieval_attn.kernels.sparse.probes import CHECK, look

KINDS = ("a_shape", "vertical_slash", "block_sparse")


def local(query, keys):
    """Every query looks about itself."""
    for x, offset in ((query, len(keys) - T), (keys, 0)):
        phase = 0.004 * (offset + torch.arange(len(x)))
        x[:, 0], x[:, 1] = 70 * phase.cos(), 70 * phase.sin()


def columns(query, keys):
    """Every query wants the same few keys."""
    query[:, 0] = 40
    keys[torch.randperm(900)[:40] + 100, 0] = 40


def slashes(query, keys):
    """Every query looks 700 tokens back, to the token."""
    some = torch.randn(S, D)
    keys += 8 * some
    query += 8 * some[S - T - 700 : S - 700]


def passages(query, keys):
    """Every 64 queries want a passage of their own, of 64 keys."""
    n_keys = len(keys)
    first = n_keys - T
    topics = torch.randn(n_keys // 64 + 2, D)
    # A passage begins where the queries begin, as blocks of keys do.
    keys += 6 * topics.repeat_interleave(64, 0)[-first % 64 :][:n_keys]
    wanted = torch.randint(1, first // 64 - 1, (T // 64,))
    query += 6 * topics[wanted].repeat_interleave(64, 0)


def flat(query, keys):
    """Every query wants everything."""


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (local, "a_shape"),
        (columns, "vertical_slash"),
        (slashes, "vertical_slash"),
        (passages, "block_sparse"),
        (flat, "dense"),
        (single_needles, "dense"),
    ],
)
def test_each_pattern_wins_where_it_fits(plant, kind):
    inputs = made(plant)
    (choice,), parts = choose(*inputs, 0.98, Layout(T, S), KINDS)
    assert choice.kind == kind
    if kind == "dense":
        assert choice.density == 1
        assert not parts
        return
    assert choice.missing <= 0.02
    ((heads, index),) = parts
    assert heads == [0]
    assert left_out(index, *inputs).square().mean().sqrt() <= 0.03
    read = reference.listed_keys(index, S)[0].float().mean() * S / (S - T / 2)
    assert read <= choice.density + 0.1


@pytest.mark.parametrize("mass", [0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_keys", [1472, 1473, S, 1536])
def test_what_is_reported_as_missing_is_missing(mass, kind, n_keys):
    """On the queries that it was checked on, at any distance between the first key and a block's edge."""
    plant = {"a_shape": local, "vertical_slash": columns, "block_sparse": passages}[kind]
    query, keys, scale = made(plant, n_keys)
    # Some of the attention goes to the first keys, which every pattern reads.
    query[..., 2] = 20
    keys[:, 40:44, 2] = 20
    layout = Layout(T, n_keys)
    (choice,), ((_, index),) = choose(query, keys, scale, mass, layout, [kind])
    assert choice.kind == kind
    rows = look(query, keys, scale, layout).rows[CHECK]
    true = left_out(index, query, keys, scale)[0, rows].square().mean().sqrt()
    assert true <= choice.missing + 1e-5
    assert choice.missing <= 1 - mass
    listed = reference.listed_keys(index, n_keys)[0].sum(-1).float().mean()
    assert choice.density == pytest.approx(float(listed) / (n_keys - T / 2), abs=0.06)


def test_a_query_that_loses_all_is_not_averaged_away():
    """One of eight loses its needle: the mean of what is left out is 1 / 8, but the output of that query is wrong."""
    query, keys, scale = made(local)
    layout = Layout(T, S)
    lonely = look(query, keys, scale, layout).rows[CHECK][3]
    keys[0, 300, 2:] = 30 * torch.randn(D - 2)
    query[0, lonely] = keys[0, 300]
    (choice,), _ = choose(query, keys, scale, 0.8, layout, ["a_shape"])
    assert choice.kind == "dense"
    (choice,), _ = choose(query, keys, scale, 0.5, layout, ["a_shape"])
    assert choice.kind == "a_shape"
    assert choice.missing == pytest.approx((1 / 8) ** 0.5, abs=0.01)


def test_heads_choose_for_themselves():
    plants = (columns, flat, local, passages)
    inputs = [made(plant) for plant in plants]
    query, keys = (torch.cat(x) for x in list(zip(*inputs, strict=True))[:2])
    choices, parts = choose(query, keys, D**-0.5, 0.98, Layout(T, S), KINDS)
    assert [choice.kind for choice in choices] == ["vertical_slash", "dense", "a_shape", "block_sparse"]
    lost = left_out(stack_heads(parts, 4), query, keys, D**-0.5)
    assert (lost[[0, 2, 3]].square().mean(1).sqrt() <= 0.03).all()
    assert (lost[1] > 0.99).all()
