"""Keys in the caller's memory, and keys that grow."""

import numpy as np
import pytest
from index_vectors import attention_like

from retrieval_attn.index.keys import Keys, check_keys, fingerprint


@pytest.fixture
def array():
    return attention_like(n_keys=300, dim=16).keys


def rows(keys):
    flat, (n_heads, n_keys, dim) = keys.flat, keys.shape
    starts = np.arange(n_heads)[:, None] * flat.stride_g + np.arange(n_keys) * flat.stride_s
    return flat.values[starts[..., None] + np.arange(dim)]


@pytest.mark.parametrize(
    "view", [lambda a: a, lambda a: a[:, 17:290], lambda a: a[:, ::3], lambda a: a[1:], lambda a: a[..., 3:11]]
)
def test_flat_rows_are_the_rows(array, view):
    keys = Keys(view(array))
    np.testing.assert_array_equal(rows(keys), view(array))
    assert np.shares_memory(keys.flat.values, array)
    assert keys.flat.values.flags.c_contiguous


def test_growing_copies_once_then_in_place(array):
    keys = Keys(array[:, :100])
    grown = keys.grown(array[:, 100:120])
    again = grown.grown(array[:, 120:200])
    np.testing.assert_array_equal(again.array, array[:, :200])
    assert np.shares_memory(grown.array, again.array)
    assert not np.shares_memory(grown.array, array)
    np.testing.assert_array_equal(keys.array, array[:, :100])
    np.testing.assert_array_equal(grown.array, array[:, :120])
    np.testing.assert_array_equal(again.grown(array[:, 200:300]).array, array)


def test_growing_in_the_callers_buffer_copies_nothing(array):
    keys = Keys(array[:, :100]).grown(array[:, 100:200], array[:, :200])
    assert np.shares_memory(keys.array, array)
    assert keys.shape == (2, 200, 16)


def test_moved_keys_are_read_where_they_are_and_grow_apart(array):
    keys = Keys(array[:, :100]).grown(array[:, 100:120])
    other = array.copy()
    moved, stayed = keys.moved(other), keys.moved()
    assert np.shares_memory(moved.array, other)
    assert np.shares_memory(stayed.array, keys.array)
    assert moved.shape == stayed.shape == keys.shape
    # There is room behind the keys, but it is the first's alone.
    grown, apart = keys.grown(array[:, 120:130]), stayed.grown(array[:, 290:300])
    assert np.shares_memory(grown.array, keys.array)
    np.testing.assert_array_equal(grown.array, array[:, :130])
    np.testing.assert_array_equal(apart.array, np.concatenate([array[:, :120], array[:, 290:300]], axis=1))


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (lambda a: a[:, :99], r"must be \(2, 100, 16\) float32.*got \(2, 99, 16\)"),
        (lambda a: a[:1], r"got \(1, 300, 16\)"),
        (lambda a: a.astype(np.float16), "float16"),
        (lambda a: a[:, 1:], "must begin with the 100 keys"),
    ],
)
def test_other_keys_to_move_to_are_refused(array, whole, message):
    with pytest.raises(ValueError, match=message):
        Keys(array[:, :100]).moved(whole(array))


def test_whole_numbers_are_keys_as_they_are(array):
    numbers = np.rint(array * 10).clip(-128, 127).astype(np.int8)
    keys = Keys(check_keys(numbers[:, ::3], "keys"))
    np.testing.assert_array_equal(rows(keys), numbers[:, ::3])
    assert np.shares_memory(keys.flat.values, numbers)
    assert keys.dtype_name == "int8"
    np.testing.assert_array_equal(keys.float32(1), numbers[1, ::3].astype(np.float32))


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (lambda a: a[:, :199], r"must be \(2, 200, 16\)"),
        (lambda a: a[:, 1:201], "must begin with the 100 keys"),
        (lambda a: np.concatenate([a[:, :100], a[:, 50:150]], axis=1), "must end with the 100 rows"),
        (lambda a: a[:, :200].astype(np.float16), "float16"),
    ],
)
def test_a_wrong_buffer_is_refused(array, whole, message):
    with pytest.raises(ValueError, match=message):
        Keys(array[:, :100]).grown(array[:, 100:200], whole(array))


def test_fingerprints_tell_keys_apart(array):
    assert fingerprint(array) == fingerprint(array.copy())
    others = [array[:, :-1], array.astype(np.float16), array[:, ::-1], array + np.float32(1e-3), array[::-1]]
    assert len({fingerprint(array), *map(fingerprint, others)}) == 6


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 299, 15), (0, 150, 7)])
def test_the_first_bad_row_is_named(array, place):
    array[place] = np.nan
    with pytest.raises(ValueError, match=f"head {place[0]}, row {place[1]}"):
        check_keys(array, "keys")
    with pytest.raises(ValueError, match=f"head {place[0]}, row {place[1]}"):
        check_keys(array.astype(np.float16), "keys")
