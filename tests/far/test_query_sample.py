"""The sample of prefill queries: even, recent, and the same however the prompt was cut."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval_attn.far.query_sample import RECENT_QUERIES, QuerySample


def rows(start, stop):
    """Queries (1, H, n, D) whose value is their token number."""
    return torch.arange(start, stop, dtype=torch.float32)[None, None, :, None].expand(1, 3, -1, 2)


def tokens(sample):
    kept = sample.queries()
    assert (kept == kept[:1, :, :1]).all()
    return kept[0, :, 0].int().tolist()


def filled(chunks, size):
    sample, length = QuerySample(size), 0
    for chunk in chunks:
        sample.add(rows(length, length + chunk))
        length += chunk
    return sample, length


@given(st.lists(st.integers(1, 900), min_size=1, max_size=6), st.integers(1, 50))
def test_sample_does_not_depend_on_chunks(chunks, size):
    """Law 4."""
    sample, length = filled(chunks, size)
    whole, _ = filled([length], size)
    assert tokens(sample) == tokens(whole)


@given(st.integers(1, 5000), st.integers(1, 64))
def test_sample_is_even_and_recent(length, size):
    sample, _ = filled([length], size)
    kept = tokens(sample)
    assert kept == sorted(set(kept))
    assert kept[-min(length, RECENT_QUERIES) :] == list(range(max(0, length - RECENT_QUERIES), length))
    spread = [t for t in kept if t < length - RECENT_QUERIES]
    assert len(spread) < 2 * size
    strides = {b - a for a, b in pairwise(spread)}
    assert len(strides) <= 1
    for stride in strides:
        assert min(length, size) <= -(-length // stride) < 2 * size


@given(st.integers(300, 3000), st.integers(0, 2999), st.integers(1, 500))
def test_crop_forgets_only_what_came_later(length, keep, more):
    keep = min(keep, length)
    sample, _ = filled([length], 16)
    sample.crop(keep)
    assert all(t < keep for t in tokens(sample)) if keep else True
    sample.add(rows(keep, keep + more))
    kept = tokens(sample)
    assert kept == sorted(set(kept))
    assert kept[-1] == keep + more - 1


def test_state_round_trip():
    sample, _ = filled([1000, 300], 16)
    twin = QuerySample(16)
    twin.restore(sample.state())
    assert tokens(twin) == tokens(sample)
    for each in (sample, twin):
        each.add(rows(1300, 1700))
    assert tokens(twin) == tokens(sample)
