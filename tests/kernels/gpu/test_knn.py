"""The kernel runs in Triton's interpreter, in float16 and float32, and is compiled for cards that are not here."""

import itertools

import numpy as np
import pytest
import torch
import triton.language as tl
from nearest import assert_best, assert_exact, off_distribution, with_ties
from triton.runtime.interpreter import TensorHandle
from triton_compile import Build, assert_fits, compile_all

from retrieval_attn.kernels import knn, nearest_keys, triton_knn
from retrieval_attn.kernels.knn import HEAD_DIMS, MOST_FUSED, NearestKeys, unpack

DTYPES = [torch.float32, torch.float16]
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


# NumPy warns of infinities, which here are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture
def quick_sort(monkeypatch):
    """Triton's own sort goes element by element in the interpreter, for seconds."""

    def sort(x, descending):
        assert descending
        return tl.tensor(TensorHandle(-np.sort(-x.handle.data), x.handle.dtype), x.type)

    monkeypatch.setattr(tl, "sort", sort)


@pytest.fixture
def small_tiles(monkeypatch, quick_sort):
    """With few slots and small tiles, short lengths see many cuts."""
    monkeypatch.setattr(triton_knn, "SETTINGS", dict.fromkeys(triton_knn.SETTINGS, (16, 16, 4)))
    monkeypatch.setattr(triton_knn, "ROOMS", (32, 64))
    monkeypatch.setattr(triton_knn, "SORTED", 128)


@pytest.fixture
def cuts(monkeypatch):
    """How often slots were cut to the best."""
    made = []
    original = triton_knn._cut_to_best
    monkeypatch.setattr(triton_knn, "_cut_to_best", lambda *args: (made.append(1), original(*args))[1])
    return made


def found(queries, keys, k, n_ranges=1):
    H, T, D = queries.shape
    most = min(k, keys.shape[1])
    folded = queries.reshape(keys.shape[0], -1, D).to(torch.promote_types(queries.dtype, keys.dtype))
    ids, scores = unpack(triton_knn.best_of_ranges(folded, keys, most, n_ranges))
    return NearestKeys(ids.view(H, T, most), scores.view(H, T, most))


@pytest.mark.usefixtures("small_tiles")
class TestSmallTiles:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("S", "k"), [(1, 1), (63, 1), (63, 16), (130, 10), (150, 48)])
    def test_lengths(self, dtype, S, k):
        for inputs in (off_distribution(S=S, dtype=dtype), with_ties(S=S, dtype=dtype)):
            assert_best(found(*inputs, k), *inputs, k)
        assert_exact(found(*inputs, k), *inputs, k)

    @pytest.mark.parametrize("D", HEAD_DIMS)
    def test_head_dimensions(self, D):
        inputs = off_distribution(S=60, D=D)
        assert_best(found(*inputs, 10), *inputs, 10)

    @pytest.mark.parametrize(("H", "G", "T"), [(1, 1, 1), (4, 1, 5), (6, 2, 7)])
    def test_rows_of_a_group_fill_tiles_in_any_way(self, H, G, T):
        inputs = with_ties(H, G, T, S=100)
        assert_exact(found(*inputs, 10), *inputs, 10)

    @pytest.mark.parametrize("n_ranges", [2, 3, 7])
    def test_ranges_of_keys_make_the_whole(self, n_ranges):
        """Also where a range holds fewer keys than k, and the last none."""
        for S in (20, 100):
            inputs = with_ties(S=S)
            assert_exact(found(*inputs, 12, n_ranges), *inputs, 12)

    def test_rising_scores_are_cut_often_and_falling_ones_once(self, cuts):
        """There is no bar before the first cut; after it, nothing that falls gets over."""
        rising = torch.arange(200.0)
        for scores in (rising, rising.flip(0)):
            cuts.clear()
            inputs = torch.ones(1, 1, 64) / 64, scores[None, :, None].expand(1, -1, 64).contiguous()
            assert_exact(found(*inputs, 16), *inputs, 16)
            assert len(cuts) == (11 if scores is rising else 1)

    def test_a_bar_that_rises_within_a_tile_is_applied_to_it(self, cuts):
        """After a cut a tile has to be compared again: only then is there room for all of it."""
        scores = torch.cat([torch.arange(32.0), torch.full((16,), 10.0), torch.arange(30.0, 46)])
        inputs = torch.ones(1, 1, 64) / 64, scores[None, :, None].expand(1, -1, 64).contiguous()
        assert_exact(found(*inputs, 16), *inputs, 16)
        assert cuts

    def test_dtypes_may_differ(self):
        queries, keys = off_distribution(S=40)
        for inputs in ((queries.half(), keys), (queries, keys.half())):
            assert_best(found(*inputs, 10), *inputs, 10)

    def test_strided_keys(self):
        queries, keys = with_ties(S=40)
        for strided in (keys.mT.contiguous().mT, torch.cat([keys, keys], -1)[..., :64], keys.flip(0).flip(0)):
            assert_exact(found(queries, strided, 10), queries, keys, 10)

    def test_scores_of_minus_infinity_are_absent(self):
        queries, keys = torch.ones(2, 3, 64), with_ties(2, 2, S=20)[1]
        keys[0, 7:], keys[1, 2] = -torch.inf, -torch.inf
        assert_exact(found(queries, keys, 20), queries, keys, 20)

    @pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
    def test_nan_shows_as_infinity(self, bad):
        queries, keys = with_ties(S=100)
        keys[1, 70, 3] = bad
        queries[2, 4] = 1
        scores = found(queries, keys, 10).scores
        assert scores[2, 4, 0] == torch.inf
        assert scores[:2].isfinite().all()


@pytest.mark.usefixtures("quick_sort")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "k"), [(110, 128), (600, 100), (1200, 300)])
def test_whole_call(monkeypatch, dtype, S, k):
    """The launch settings as they are, under the checks and the padding of `nearest_keys`."""
    monkeypatch.setattr(
        knn, "_best_keys", lambda q, x, k: triton_knn.best_of_ranges(q.to(x.dtype)[None], x[None], k, 1)[0]
    )
    inputs = with_ties(H=2, G=1, T=3, S=S, D=128, dtype=dtype)
    assert_exact(nearest_keys(*inputs, k), *inputs, k)


def test_with_the_sort_of_triton(monkeypatch):
    monkeypatch.setattr(triton_knn, "SETTINGS", dict.fromkeys(triton_knn.SETTINGS, (16, 16, 4)))
    monkeypatch.setattr(triton_knn, "ROOMS", (32,))
    monkeypatch.setattr(triton_knn, "SORTED", 512)
    inputs = with_ties(H=1, G=1, S=50)
    assert_exact(found(*inputs, 5), *inputs, 5)


def test_short_calls_have_several_ranges(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"multi_processor_count": 100}))
    monkeypatch.setattr(triton_knn, "best_of_ranges", lambda queries, keys, k, n_ranges: n_ranges)
    for N, S, n_ranges in ((16, 10**6, 25), (16, 100, 1), (16, 20_000, 2), (6400, 10**6, 1)):
        queries, keys = torch.empty(8, N, 128, dtype=torch.half), torch.empty(8, 1, 128).expand(-1, S, -1)
        assert triton_knn.best_keys(queries, keys, 100) == n_ranges


def build(cc, D, dtype, stored, k):
    constants, options = triton_knn.settings(D, dtype, k)
    types = {"queries": f"*{NAMES[dtype]}:16", "keys": f"*{NAMES[stored]}:16", "slots": "*i64:16", "bars": "*fp32:16"}
    types |= {"keys_g": "i32:16", "keys_s": "i32:16"} | dict.fromkeys(("N", "S", "span", "k"), "i32")
    kernel = "retrieval_attn.kernels.triton_knn:_find"
    return Build(kernel, cc, tuple(types.items()), tuple(constants.items()), tuple(options.items()))


CASES = list(itertools.product((80, 89, 90), HEAD_DIMS, [(x, x) for x in NAMES], (128,)))
# Keys of another dtype than the queries, and as many slots as there may be.
CASES += [(89, D, (torch.float32, torch.bfloat16), 128) for D in HEAD_DIMS]
CASES += [(89, 128, (x, x), MOST_FUSED) for x in NAMES]


@pytest.mark.parametrize(("cc", "D", "dtypes", "k"), CASES)
def test_compiles(cc, D, dtypes, k):
    builds = {case: build(case[0], case[1], *case[2], case[3]) for case in CASES}
    assert_fits(compile_all(tuple(builds.values()))[builds[cc, D, dtypes, k]], cc)
