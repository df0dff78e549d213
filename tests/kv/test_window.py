"""Near and far: every token in one of them, never in both, whatever happens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval_attn.kv.window import Window, split


@given(st.integers(0, 2000), st.integers(0, 300), st.integers(1, 700))
def test_split_holds_every_token_once(length, n_sink, n_local):
    """Law 3."""
    parts = split(length, n_sink, n_local)
    near = [*range(parts.sink_stop), *range(parts.far_stop, length)]
    far = range(parts.sink_stop, parts.far_stop)
    assert sorted([*near, *far]) == list(range(length))
    assert len(near) == min(length, n_sink + n_local)


def rows(start, stop):
    """Keys whose value is their token number, so that a wrong token shows."""
    return torch.arange(start, stop, dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, 3)


def tokens_in(window):
    keys = window.keys()[0, 0, :, 0]
    assert torch.equal(window.values(), -window.keys())
    return sorted(keys.int().tolist())


def expected(length, n_sink, n_local):
    parts = split(length, n_sink, n_local)
    return [*range(parts.sink_stop), *range(parts.far_stop, length)]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.integers(0, 10),
    st.integers(1, 40),
    st.lists(st.integers(0, 50), max_size=3),
)
def test_window_holds_exactly_the_near_tokens(chunks, n_sink, n_local, crops):
    """Appended in any chunks and cropped at any time, it holds what `split` calls near."""
    window, length = Window(n_sink, n_local), 0
    crops = [*crops, *([0] * len(chunks))]
    for chunk, crop in zip(chunks, crops, strict=False):
        keys = rows(length, length + chunk)
        window.append(keys, -keys)
        length += chunk
        assert tokens_in(window) == expected(length, n_sink, n_local)
        if 0 < crop < length:
            length -= crop
            window.crop(length, lambda start, stop: (rows(start, stop)[0], -rows(start, stop)[0]))
            assert tokens_in(window) == expected(length, n_sink, n_local)


def test_one_token_moves_one_row():
    window = Window(2, 4)
    keys = rows(0, 10)
    window.append(keys, -keys)
    before = window.keys().clone()
    window.append(rows(10, 11), -rows(10, 11))
    assert (window.keys() != before)[0, 0, :, 0].sum() == 1


def test_copy_is_independent():
    window = Window(2, 4)
    keys = rows(0, 10)
    window.append(keys, -keys)
    twin = window.copy()
    twin.append(rows(10, 11), -rows(10, 11))
    assert tokens_in(window) == expected(10, 2, 4)
    assert tokens_in(twin) == expected(11, 2, 4)


@given(st.integers(1, 90), st.integers(0, 10), st.integers(1, 40), st.integers(1, 30))
def test_refilled_it_is_the_window_it_would_have_become(length, n_sink, n_local, more):
    def read(start, stop):
        return rows(start, stop)[0], -rows(start, stop)[0]

    window = Window(n_sink, n_local)
    window.refill(length, torch.device("cpu"), read)
    assert tokens_in(window) == expected(length, n_sink, n_local)
    window.append(rows(length, length + more), -rows(length, length + more))
    assert tokens_in(window) == expected(length + more, n_sink, n_local)
