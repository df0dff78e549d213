"""Inner products with 4-bit key codes, inside compiled code: sixteen keys by four queries at a time.

Codes stand in blocks of sixteen keys. A block is a run of 64-byte groups, one vector register each; a group holds eight
dimensions of the sixteen keys. Byte 4 * lane + i has dimension i of that key in its low half and dimension 4 + i
in its high half. So four bytes times four signed weights, summed into one 32-bit number, is one instruction for
sixteen keys where the processor has VNNI, and three with AVX2; without either it is plain vector arithmetic.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from retrieval_attn.compiled import intrinsic

LANES = 16
TILE = 4
GROUP_BYTES = 64
GROUP_DIMS = 8

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS = ir.VectorType(_I32, LANES)
_BYTES = ir.VectorType(_I8, GROUP_BYTES)
_SCORES = ir.VectorType(_F32, LANES)


@intrinsic
def score_block(
    typingctx: Any, codes: Any, first_byte: Any, n_groups: Any, weights: Any, factors: Any, first_key: Any,
    lifted: Any, bonus: Any, bonus_at: Any, bonus_scales: Any, floors: Any, scores: Any, scores_at: Any,
) -> Any:  # fmt: skip
    """Estimate the scores of one block for four queries; returns in 64 bits which of them reach their query's floor.

    codes: uint8; the block begins at first_byte and has n_groups groups.
    weights: int32, for each group, half (low, high) and query four signed bytes; then, for each query, what its sums
        begin with.
    factors: uint16 (bfloat16 bits) by key; the block's first is at first_key.
    lifted: whether to add bonus[bonus_at + j], times the query's bonus_scales, to the score of key j.
    bonus_scales, floors: (4,) float32.
    scores: float32, written: that of query i and key j of the block at scores_at + 16 * i + j.
    All arrays one-dimensional and C-contiguous. Bit 16 * i + j of the result belongs to query i and key j; a score
    that is no number reaches every floor.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer(i: int, at: Any, element: Any) -> Any:
            view = context.make_array(signature.args[i])(context, builder, args[i])
            return builder.bitcast(builder.gep(view.data, [at]), element.as_pointer())

        def each(i: int) -> list[Any]:
            return [_spread(builder, builder.load(pointer(i, _I64(row), _F32))) for row in range(TILE)]

        first_group, weight = pointer(0, args[1], _BYTES), pointer(3, _I64(0), _I32)
        sums = _sums(builder, _dot_for(context.codegen()._tm_features), first_group, args[2], weight)
        factor = _bfloat16(builder, builder.load(pointer(4, args[5], ir.VectorType(_I16, LANES)), align=1))
        estimates = [cgutils.alloca_once_value(builder, builder.fmul(factor, builder.sitofp(s, _SCORES))) for s in sums]
        with builder.if_then(args[6]):
            extra = builder.load(pointer(7, args[8], _SCORES), align=1)
            for estimate, scale in zip(estimates, each(9), strict=True):
                builder.store(builder.fadd(builder.load(estimate), builder.fmul(scale, extra)), estimate)
        reached = _I64(0)
        for row, (estimate, floor) in enumerate(zip(estimates, each(10), strict=True)):
            score = builder.load(estimate)
            builder.store(score, pointer(11, builder.add(args[12], _I64(LANES * row)), _SCORES), align=4)
            bits = builder.bitcast(builder.fcmp_unordered(">=", score, floor), _I16)
            reached = builder.or_(reached, builder.shl(builder.zext(bits, _I64), _I64(LANES * row)))
        return reached

    given = (
        codes, types.intp, types.intp, weights, factors, types.intp, types.boolean, bonus, types.intp, bonus_scales,
        floors, scores, types.intp,
    )  # fmt: skip
    return types.uint64(*given), codegen


def _sums(builder: Any, dot: Any, first_group: Any, n_groups: Any, weight: Any) -> list[Any]:
    """For each query the sixteen sums of products of weights and codes, over all groups of a block."""
    begin = builder.gep(weight, [builder.mul(n_groups, _I64(2 * TILE))])
    sums = [
        cgutils.alloca_once_value(builder, _spread(builder, builder.load(builder.gep(begin, [_I64(row)]))))
        for row in range(TILE)
    ]
    with cgutils.for_range(builder, n_groups, intp=_I64) as loop:
        packed = builder.load(builder.gep(first_group, [loop.index]), align=1)
        codes = builder.and_(packed, _constant(_BYTES, 15)), builder.lshr(packed, _constant(_BYTES, 4))
        at = builder.mul(loop.index, _I64(2 * TILE))
        for row in range(TILE):
            places = builder.add(at, _I64(row)), builder.add(at, _I64(TILE + row))
            weights = [_spread(builder, builder.load(builder.gep(weight, [place]))) for place in places]
            halves = list(zip(codes, weights, strict=True))
            builder.store(dot(builder, builder.load(sums[row]), halves), sums[row])
    return [builder.load(s) for s in sums]


@intrinsic
def lowest_bit(typingctx: Any, mask: Any) -> Any:
    """The position of the lowest bit that is set; `mask` is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.uint64), codegen


def _dot_for(features: str) -> Any:
    """What adds, for each key, four products of both halves to its sum: the best that the processor can do."""
    have = set(features.split(","))
    if {"+avx512vnni", "+avx512f"} <= have:
        return _dot_vnni_512
    if "+avxvnni" in have or {"+avx512vnni", "+avx512vl"} <= have:
        return _dot_vnni_256
    if "+avx2" in have:
        return _dot_avx2
    return _dot_plain


def _dot_vnni_512(builder: Any, total: Any, halves: Any) -> Any:
    for code, weight in halves:
        total = _call(builder, "llvm.x86.avx512.vpdpbusd.512", _SUMS, total, builder.bitcast(code, _SUMS), weight)
    return total


def _dot_vnni_256(builder: Any, total: Any, halves: Any) -> Any:
    parts = _cut(builder, total)
    for code, weight in halves:
        codes, weights = _cut(builder, builder.bitcast(code, _SUMS)), _cut(builder, weight)
        parts = [
            _call(builder, "llvm.x86.avx512.vpdpbusd.256", part.type, part, c, w)
            for part, c, w in zip(parts, codes, weights, strict=True)
        ]
    return _joined(builder, parts)


def _dot_avx2(builder: Any, total: Any, halves: Any) -> Any:
    """Pairs of products fit 16 bits: four of at most 15 * 127."""
    pairs, bytes_, sums = (ir.VectorType(t, n) for t, n in ((_I16, 16), (_I8, 32), (_I32, 8)))
    found = []
    for half in (0, 1):
        products = []
        for code, weight in halves:
            c = builder.bitcast(_cut(builder, builder.bitcast(code, _SUMS))[half], bytes_)
            w = builder.bitcast(_cut(builder, weight)[half], bytes_)
            products.append(_call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, c, w))
        both = builder.add(*products)
        found.append(_call(builder, "llvm.x86.avx2.pmadd.wd", sums, both, _constant(pairs, 1)))
    return builder.add(total, _joined(builder, found))


def _dot_plain(builder: Any, total: Any, halves: Any) -> Any:
    for code, weight in halves:
        codes = builder.bitcast(code, _SUMS)
        for shift in (0, 8, 16, 24):
            c = builder.and_(builder.lshr(codes, _constant(_SUMS, shift)), _constant(_SUMS, 15))
            w = builder.ashr(builder.shl(weight, _constant(_SUMS, 24 - shift)), _constant(_SUMS, 24))
            total = builder.add(total, builder.mul(c, w))
    return total


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    type_ = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, type_, name), args)


def _cut(builder: Any, vector: Any) -> list[Any]:
    n = vector.type.count // 2
    index = ir.VectorType(_I32, n)
    return [builder.shuffle_vector(vector, vector, index([_I32(start + i) for i in range(n)])) for start in (0, n)]


def _joined(builder: Any, parts: list[Any]) -> Any:
    n = 2 * parts[0].type.count
    return builder.shuffle_vector(*parts, ir.VectorType(_I32, n)([_I32(i) for i in range(n)]))


def _spread(builder: Any, value: Any) -> Any:
    """A vector of LANES equal numbers."""
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(first, first, _constant(ir.VectorType(_I32, LANES), 0))


def _bfloat16(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(bits, _SUMS), _constant(_SUMS, 16)), _SCORES)


def _constant(vector: Any, value: int) -> Any:
    return vector([vector.element(value)] * vector.count)
