"""Every kernel compiled, without a GPU, as its launcher would have it compiled: it fits the card and spills nothing.

A quarter of a minute at first, some minutes with `--long`; what Triton's cache holds is not compiled again.
"""

import itertools

import pytest
import torch
from laws import rarely, some_of
from triton_compile import Build, assert_fits, compile_all, compile_case

from retrieval_attn.kernels.sparse import on_gpu as triton_sparse
from retrieval_attn.kernels.sparse.lists import HEAD_DIMS

CARDS = [80, 89, 90]

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def sparse(head_dim, kind, cc):
    dtype, rows = kind
    data, index = f"*{TYPES[dtype]}:16", "*i32:16"
    signature = dict.fromkeys(("query", "keys", "values", "out"), data) | {"lse": "*fp32:16"}
    signature |= dict.fromkeys(("blocks", "n_blocks", "columns", "n_columns"), index)
    signature |= {f"{x}_{axis}": "i32:16" for x in ("query", "key", "value") for axis in ("batch", "head", "row")}
    signature |= {"scale": "fp32"} | dict.fromkeys("HRTSNAC", "i32")
    constants, options = triton_sparse.launch(head_dim, dtype, rows, rows, cc // 10)
    kernel = "retrieval_attn.kernels.sparse.on_gpu:_attend"
    return Build(kernel, cc, tuple(signature.items()), tuple(constants.items()), tuple(options.items()))


# One height of tile for each dtype, and the other heights.
KINDS = ((torch.float16, 128), (torch.bfloat16, 64), (torch.float32, 64))
OTHERS = ((torch.float16, 64), (torch.bfloat16, 128))
CASES = some_of(HEAD_DIMS, KINDS, CARDS, few=3)
CASES += rarely(*itertools.product(HEAD_DIMS, OTHERS, CARDS))


@pytest.mark.parametrize(("head_dim", "kind", "cc"), CASES)
def test_fits_the_card(head_dim, kind, cc):
    assert_fits(compile_case(sparse, (head_dim, kind, cc), CASES), cc)


@pytest.mark.parametrize("cc", [80, *rarely(89, 90)])
def test_sparse_loads_run_ahead_and_weights_stay_in_registers(cc):
    """Two drafts were right and slow, and only their shared memory told.

    One read a position and then the keys there: Triton gave it one buffer, and it waited for every tile. One kept its
    output in one piece, twice as wide as high: before Hopper, Triton then spreads each row of scores over all warps,
    and the weights go through shared memory.
    """
    build = sparse(128, (torch.bfloat16, 64), cc)
    queries, tile = 2 * 64 * 128, 2 * 2 * dict(build.constexprs)["BLOCK_N"] * 128
    shared = compile_all((build,))[build].shared
    assert shared >= queries + 2 * tile
    assert shared == queries + 2 * tile or cc >= 90


def test_reports_what_fails_to_compile():
    build = sparse(64, (torch.float16, 64), 89)
    broken = build._replace(constexprs=(*build.constexprs, ("BLOCK_N", 48)))
    result = compile_all((broken,))[broken]
    assert "power of 2" in result
    with pytest.raises(AssertionError, match="power of 2"):
        assert_fits(result, 89)
