"""Searching 4-bit codes: estimate every key's score, take those of best estimate, score them exactly.

The scan takes what reaches a floor; the floor is found on a sample of the keys, so that about as many pass as are
wanted. So no key is compared with another while the scan runs, and it goes about as fast as memory.
"""

from typing import NamedTuple

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit, prefetch
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.loops.dots import dot
from retrieval_attn.index.scan.codes import Codes
from retrieval_attn.index.scan.dots import GROUP_BYTES, GROUP_DIMS, LANES, TILE, lowest_bit, score_block
from retrieval_attn.index.scan.entries import Found, as_entry, keep_best, order_of, score_at
from retrieval_attn.index.scan.rescore import CUT, rescore

# Queries per KV head and pass, which bounds the memory that entries take.
MOST_QUERIES = 64

# A chunk shorter than this costs more to hand to a thread than to scan.
MIN_CHUNK = 4096

# A buffer of entries has room for this many times the keys wanted; a full one is cut back to CUT times as many.
BUFFER = 4

# The sample is every so many blocks that this many wanted keys are in it: their number is then known to about 25 %.
SAMPLE_HITS = 16
SAMPLE_STEPS = (8, 32)

# Blocks in which a key passed wait for their entries to be written, so that the scan itself has no branch to guess.
# Their scores fill half of a small first-level cache.
WAITING = 64
BLOCK_SCORES = TILE * LANES

# How far ahead memory is asked for, in blocks of the scan (processors stop at the end of a page by themselves) and of
# the sample.
BLOCKS_AHEAD = 32
SAMPLED_AHEAD = 4


class Tiles(NamedTuple):
    """Queries as codes are scanned for them, four at a time; of one tile, without the axes before the last.

    weights: (G, tiles, n) int32, the queries' signed bytes and what their sums begin with, as `score_block` reads them.
    bonus_scales: (G, tiles, TILE) float32, what a bonus is worth in a query's units. floors: (G, tiles, TILE) float32,
    the estimates from which on a key is taken.
    """

    weights: Array
    bonus_scales: Array
    floors: Array


class HeadCodes(NamedTuple):
    """The codes of the first n_keys keys of one head: blocks (bytes,), factors (n,), and bonus (n,) or (0,)."""

    blocks: Array
    factors: Array
    bonus: Array
    n_keys: int


def search_codes(keys: Keys, codes: Codes, maps: Array, queries: Array, k: int, n_wanted: int) -> tuple[Array, Array]:
    """The k best of about n_wanted keys of best estimate per query: ids (G, N, k) int32 and exact scores.

    maps: (G, m, D), of the queries (G, N, D). k <= n_wanted <= S. All cores work, also when G is 1.
    """
    n_heads, n_queries, _ = queries.shape
    ids = np.empty((n_heads, n_queries, k), np.int32)
    scores = np.empty((n_heads, n_queries, k), np.float32)
    for start in range(0, n_queries, MOST_QUERIES):
        stop = min(start + MOST_QUERIES, n_queries)
        found = find_candidates(keys, codes, maps, queries, start, stop, k, n_wanted)
        rescore(keys.flat, queries, start, stop, n_wanted, found, ids, scores)
    return ids, scores


def find_candidates(
    keys: Keys, codes: Codes, maps: Array, queries: Array, start: int, stop: int, k: int, n_wanted: int
) -> Found:
    """Entries (G, tiles, chunks, TILE, n) of at least k keys for each of the queries start..stop."""
    n_heads, n_keys = len(queries), codes.n_keys
    n_tiles = -(-(stop - start) // TILE)
    n_chunks = max(1, min(-(-4 * numba.get_num_threads() // n_heads), n_keys // MIN_CHUNK))
    weights = np.zeros((n_heads, n_tiles, TILE * (2 * maps.shape[1] // GROUP_DIMS + 1)), np.int32)
    bonus_scales = np.ones((n_heads, n_tiles, TILE), np.float32)
    # Queries that are only there to fill the last tile let nothing pass.
    floors = np.full((n_heads, n_tiles, TILE), np.inf, np.float32)
    tiles = Tiles(weights, bonus_scales, floors)
    make_ready(codes, keys.bonus, maps, queries, start, stop, n_wanted, tiles)
    entries = np.empty((n_heads, n_tiles, n_chunks, TILE, BUFFER * n_wanted), np.int64)
    found = Found(entries, np.zeros(entries.shape[:-1], np.int64))
    collect(codes, keys.bonus, n_wanted, tiles, np.ones((n_heads, n_tiles), np.bool_), found)
    # The sample may mislead; without a floor enough are found, only more slowly.
    few = (found.counts.sum(axis=2) < max(k, n_wanted // 2)) & (floors < np.inf)
    if few.any():
        floors[few] = -np.inf
        collect(codes, keys.bonus, n_wanted, tiles, few.any(axis=2), found)
    return found


@jit(inline="always")
def codes_of(codes: Codes, bonus: Array, head: int) -> HeadCodes:
    """The codes of one head, with its bonuses."""
    return HeadCodes(codes.blocks[head].reshape(-1), codes.factors[head], bonus[head], codes.n_keys)


@jit(inline="always")
def tile_of(tiles: Tiles, head: int, tile: int) -> Tiles:
    """One tile of one head."""
    return Tiles(tiles.weights[head, tile], tiles.bonus_scales[head, tile], tiles.floors[head, tile])


@jit(parallel=True)
def make_ready(
    codes: Codes, bonus: Array, maps: Array, queries: Array, start: int, stop: int, n_wanted: int, tiles: Tiles
) -> None:
    """Write weights, scales of the bonus and floors for each tile of four queries."""
    n_heads, n_tiles, _ = tiles.floors.shape
    for task in numba.prange(n_heads * n_tiles):
        head, tile = task // n_tiles, task % n_tiles
        first = start + TILE * tile
        few = queries[head, first : min(first + TILE, stop)]
        # Written in a function of its own: numba takes an assignment to a part of a tuple's array for dead here.
        weigh(few, maps[head], tile_of(tiles, head, tile))
        if codes.n_keys > BUFFER * n_wanted and codes.n_keys >= LANES * SAMPLE_STEPS[0]:
            find_floors(codes_of(codes, bonus, head), n_wanted, tile_of(tiles, head, tile))


@jit(parallel=True)
def collect(codes: Codes, bonus: Array, n_wanted: int, tiles: Tiles, marked: Array, found: Found) -> None:
    """Entries of the keys that reach the floors, chunk by chunk, for the tiles that are marked (G, tiles)."""
    n_heads, n_tiles, n_chunks, _ = found.counts.shape
    n_blocks = (codes.n_keys + LANES - 1) // LANES
    size = (n_blocks + n_chunks - 1) // n_chunks
    for task in numba.prange(n_heads * n_chunks):
        head, chunk = task // n_chunks, task % n_chunks
        own, first, last = codes_of(codes, bonus, head), chunk * size, min((chunk + 1) * size, n_blocks)
        for tile in range(n_tiles):
            if marked[head, tile]:
                weights, bonus_scales, floors = tile_of(tiles, head, tile)
                # Floors rise while a chunk is scanned.
                asked = Tiles(weights, bonus_scales, floors.copy())
                part = Found(found.entries[head, tile, chunk], found.counts[head, tile, chunk])
                scan_blocks(own, first, last, 1, CUT * n_wanted, asked, part)


@jit()
def weigh(queries: Array, projection: Array, tile: Tiles) -> None:
    """Up to four queries as signed bytes: their coordinates, in units of the largest over 127. See `score_block`.

    Their floors are opened.
    """
    weights, bonus_scales, floors = tile
    dims = len(projection)
    signed_bytes = weights.view(np.int8)
    coordinates = np.empty(dims, np.float32)
    for row in range(len(queries)):
        floors[row] = -np.inf
        for d in range(dims):
            coordinates[d] = dot(projection[d], 0, queries[row])
        unit = np.abs(coordinates).max() / np.float32(127)
        if not unit > 0:
            continue
        bonus_scales[row] = 1 / unit
        total = 0
        for d in range(dims):
            weight = int(np.rint(coordinates[d] / unit))
            signed_bytes[4 * (TILE * (d // 4) + row) + d % 4] = weight
            total += weight
        # A code c stands for c - 7.5.
        weights[TILE * (dims // 4) + row] = -(15 * total) // 2


@jit()
def find_floors(codes: HeadCodes, n_wanted: int, tile: Tiles) -> None:
    """Set floors of -inf so that about n_wanted keys reach them, as every so many blocks say."""
    floors = tile.floors
    n_blocks = codes.n_keys // LANES
    step = min(max(n_wanted // SAMPLE_HITS, SAMPLE_STEPS[0]), SAMPLE_STEPS[1])
    n_sampled = (n_blocks + step - 1) // step
    n_kept = n_wanted * n_sampled // n_blocks + 1
    found = Found(np.empty((TILE, BUFFER * n_kept), np.int64), np.empty(TILE, np.int64))
    whole = HeadCodes(codes.blocks, codes.factors, codes.bonus, n_blocks * LANES)
    scan_blocks(whole, 0, n_blocks, step, n_kept, Tiles(tile.weights, tile.bonus_scales, floors.copy()), found)
    for row in range(TILE):
        if floors[row] == -np.inf:
            keep_best(found.entries[row], found.counts[row], n_kept)
            floors[row] = score_at(order_of(found.entries[row, :n_kept].min()))


@jit()
def scan_blocks(codes: HeadCodes, first: int, last: int, step: int, n_wanted: int, tile: Tiles, found: Found) -> None:
    """Entries (TILE, n) of the keys in every step-th block of first..last that reach the floors.

    n > n_wanted. If more keys reach a floor it rises, and at least the n_wanted best of them are among the entries.
    """
    blocks, factors, bonus, n_keys = codes
    weights, bonus_scales, floors = tile
    n_groups = len(weights) // (2 * TILE)
    size = n_groups * GROUP_BYTES
    lifted = len(bonus) > 0
    reached, keys = np.empty(WAITING, np.uint64), np.empty(WAITING, np.int64)
    scores = np.empty(WAITING * BLOCK_SCORES, np.float32)
    # While floors rise fast, blocks should not wait for long.
    n, n_most = 0, 1
    found.counts[:] = 0
    for block in range(first, min(last, n_keys // LANES), step):
        ahead = block + (BLOCKS_AHEAD if step == 1 else SAMPLED_AHEAD * step)
        prefetch(factors, ahead * LANES)
        prefetch(blocks, ahead * size, size)
        key = block * LANES
        passed = score_block(
            blocks, block * size, n_groups, weights, factors, key, lifted, bonus, key, bonus_scales, floors, scores,
            n * BLOCK_SCORES,
        )  # fmt: skip
        keys[n], reached[n] = key, passed
        n += passed != 0
        if n == n_most:
            write_entries(reached, keys, n, scores, n_wanted, floors, found)
            n, n_most = 0, min(2 * n_most, WAITING)
    n_rest = n_keys % LANES
    if n_rest and last * LANES > n_keys:
        key = n_keys - n_rest
        # The last block reaches past the bonuses.
        extra = np.zeros(LANES, np.float32)
        extra[: n_rest if lifted else 0] = bonus[key:n_keys]
        passed = score_block(
            blocks, key // LANES * size, n_groups, weights, factors, key, lifted, extra, 0, bonus_scales, floors,
            scores, n * BLOCK_SCORES,
        )  # fmt: skip
        alive = np.uint64(0x0001000100010001) * np.uint64((1 << n_rest) - 1)
        keys[n], reached[n] = key, passed & alive
        n += 1
    write_entries(reached, keys, n, scores, n_wanted, floors, found)


@jit()
def write_entries(
    reached: Array, keys: Array, n: int, scores: Array, n_wanted: int, floors: Array, found: Found
) -> None:
    """An entry for each bit of the first n of `reached`. Full entries are cut back to the best, below the new floor."""
    entries, counts = found
    bits = scores.view(np.int32)
    for i in range(n):
        left = reached[i]
        while left:
            at = lowest_bit(left)
            left &= left - np.uint64(1)
            row = at // LANES
            entries[row, counts[row]] = as_entry(bits[i * BLOCK_SCORES + at], keys[i] + at % LANES)
            counts[row] += 1
            if counts[row] == entries.shape[1]:
                keep_best(entries[row], counts[row], n_wanted)
                counts[row] = n_wanted
                # Later keys of equal score are worse, for their number.
                floors[row] = score_at(order_of(entries[row, :n_wanted].min()) + 1)
