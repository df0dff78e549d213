"""Inner products with 4-bit codes: the same whatever instructions the processor has."""

import os
import subprocess
import sys

import numpy as np
import pytest

from retrieval_attn.arrays import as_float32
from retrieval_attn.compiled import jit
from retrieval_attn.index.scan.dots import GROUP_BYTES, LANES, TILE, lowest_bit, score_block

AVX2 = "+64bit,+cmov,+cx8,+fxsr,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt"


@jit()
def run(codes, n_groups, weights, factors, lifted, bonus, bonus_scales, floors, scores):
    """Block 1 of the codes, its scores written behind 7 others."""
    first = n_groups * GROUP_BYTES
    return score_block(
        codes, first, n_groups, weights, factors, LANES, lifted, bonus, LANES, bonus_scales, floors, scores, 7
    )


@jit()
def lowest(x):
    return lowest_bit(x)


def scene(n_groups, seed=0):
    """Codes of two blocks, weights as bytes (groups, halves, TILE, 4) and what the sums begin with."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, 2 * n_groups * GROUP_BYTES, dtype=np.uint8)
    weights = rng.integers(-127, 128, (n_groups, 2, TILE, 4)).astype(np.int8)
    # The largest sums there are: nothing may overflow on the way.
    codes[-GROUP_BYTES:], weights[-1, :, 0], weights[-1, :, 1] = 255, 127, -127
    begin = rng.integers(-9999, 9999, TILE).astype(np.int32)
    factors = (rng.random(2 * LANES, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return codes, weights, begin, factors, rng.standard_normal(2 * LANES, dtype=np.float32)


def by_definition(codes, weights, begin, factors):
    """Scores (TILE, LANES) of block 1."""
    block = codes[len(codes) // 2 :].reshape(-1, LANES, 4).astype(np.int64)
    halves = np.stack([block & 15, block >> 4], axis=1)
    sums = np.einsum("ghki,ghqi->qk", halves, weights.astype(np.int64)) + begin[:, None]
    return as_float32(factors)[LANES:] * sums


def packed(weights, begin):
    return np.concatenate([weights.reshape(-1).view(np.int32), begin])


def check(n_groups):
    codes, weights, begin, factors, bonus = scene(n_groups)
    true = by_definition(codes, weights, begin, factors)
    scales, scores = np.array([1, 2, -3, 0.5], np.float32), np.full(7 + TILE * LANES + 1, np.nan, np.float32)
    floors = np.median(true, axis=1).astype(np.float32)
    for lifted in (False, True):
        expected = true + lifted * scales[:, None] * bonus[LANES:]
        bits = run(codes, n_groups, packed(weights, begin), factors, lifted, bonus, scales, floors, scores)
        found = scores[7:-1].reshape(TILE, LANES)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
        assert np.isnan(scores[[6, -1]]).all()
        passed = [bool(int(bits) >> i & 1) for i in range(TILE * LANES)]
        np.testing.assert_array_equal(passed, (found >= floors[:, None]).reshape(-1))


@pytest.mark.parametrize("n_groups", [1, 2, 9])
def test_scores_follow_the_definition(n_groups):
    check(n_groups)


@pytest.mark.parametrize(
    "processor",
    [
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2},
        {"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": f"{AVX2},+avxvnni"},
    ],
    ids=lambda p: p["NUMBA_CPU_NAME"],
)
def test_other_processors_get_the_same_scores(processor):
    import llvmlite.binding

    have = llvmlite.binding.get_host_cpu_features()
    wanted = [name[1:] for name in processor.get("NUMBA_CPU_FEATURES", "").split(",") if name]
    if not all(have.get(name) for name in wanted):
        pytest.skip("this machine lacks the instructions")
    code = "import test_dots as t; t.check(3); print('same')"
    environment = os.environ | processor | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "same\n", done.stderr


def test_what_is_no_number_passes_every_floor():
    codes, weights, begin, factors, bonus = scene(2)
    factors[LANES + 3] = 0x7FC0
    scores, floors = np.empty(7 + TILE * LANES, np.float32), np.full(TILE, np.inf, np.float32)
    bits = run(codes, 2, packed(weights, begin), factors, False, bonus, np.ones(TILE, np.float32), floors, scores)
    assert int(bits) == sum(1 << (LANES * i + 3) for i in range(TILE))


@pytest.mark.parametrize("bit", [0, 1, 31, 63])
def test_lowest_bit(bit):
    assert lowest(np.uint64(1 << bit | 1 << 63)) == bit
