"""Searching 4-bit codes: estimate every key's score, take those of best estimate, score them exactly.

The scan takes what reaches a floor; the floor is found on a sample of the keys, so that about as many pass as are
wanted. So no key is compared with another while the scan runs, and it goes about as fast as memory.
"""

import numba
import numpy as np

from retrieval_attn.arrays import Array
from retrieval_attn.compiled import jit
from retrieval_attn.index.keys import Keys
from retrieval_attn.index.loops.dots import dot, prefetch
from retrieval_attn.index.scan.codes import Codes
from retrieval_attn.index.scan.dots import GROUP_BYTES, GROUP_DIMS, LANES, TILE, lowest_bit, score_block
from retrieval_attn.index.scan.entries import as_entry, keep_best, order_of, score_at
from retrieval_attn.index.scan.rescore import rescore

# Queries per KV head and pass, which bounds the memory that entries take.
MOST_QUERIES = 64

# A chunk shorter than this costs more to hand to a thread than to scan.
MIN_CHUNK = 4096

# A buffer of entries has room for this many times the keys wanted; a full one is cut back to those wanted.
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


def search_codes(keys: Keys, codes: Codes, maps: Array, queries: Array, k: int, n_wanted: int) -> tuple[Array, Array]:
    """The k best of about n_wanted keys of best estimate per query: ids (G, N, k) int32 and exact scores.

    maps: (G, m, D), of the queries (G, N, D). k <= n_wanted <= S. All cores work, also when G is 1.
    """
    n_heads, n_queries, _ = queries.shape
    ids = np.empty((n_heads, n_queries, k), np.int32)
    scores = np.empty((n_heads, n_queries, k), np.float32)
    for start in range(0, n_queries, MOST_QUERIES):
        stop = min(start + MOST_QUERIES, n_queries)
        entries, counts = find_candidates(keys, codes, maps, queries, start, stop, k, n_wanted)
        rescore(*keys.flat, keys.bonus, queries, start, stop, n_wanted, entries, counts, ids, scores)
    return ids, scores


def find_candidates(
    keys: Keys, codes: Codes, maps: Array, queries: Array, start: int, stop: int, k: int, n_wanted: int
) -> tuple[Array, Array]:
    """Entries of at least k keys for each of the queries start..stop.

    Returns entries (G, tiles, chunks, TILE, n) int64 and how many of each n there are, (G, tiles, chunks, TILE).
    """
    n_heads, n_keys = len(queries), codes.n_keys
    n_tiles = -(-(stop - start) // TILE)
    n_chunks = max(1, min(-(-4 * numba.get_num_threads() // n_heads), n_keys // MIN_CHUNK))
    weights = np.zeros((n_heads, n_tiles, TILE * (2 * maps.shape[1] // GROUP_DIMS + 1)), np.int32)
    bonus_scales = np.ones((n_heads, n_tiles, TILE), np.float32)
    # Queries that are only there to fill the last tile let nothing pass.
    floors = np.full((n_heads, n_tiles, TILE), np.inf, np.float32)
    coded = (codes.blocks, codes.factors, keys.bonus, n_keys)
    make_ready(*coded, maps, queries, start, stop, n_wanted, weights, bonus_scales, floors)
    entries = np.empty((n_heads, n_tiles, n_chunks, TILE, BUFFER * n_wanted), np.int64)
    counts = np.zeros(entries.shape[:-1], np.int64)
    tiles = np.ones((n_heads, n_tiles), np.bool_)
    collect(*coded, n_wanted, weights, bonus_scales, floors, tiles, entries, counts)
    # The sample may mislead; without a floor enough are found, only more slowly.
    few = (counts.sum(axis=2) < max(k, n_wanted // 2)) & (floors < np.inf)
    if few.any():
        floors[few] = -np.inf
        collect(*coded, n_wanted, weights, bonus_scales, floors, few.any(axis=2), entries, counts)
    return entries, counts


@jit(parallel=True)
def make_ready(
    blocks: Array, factors: Array, bonus: Array, n_keys: int, maps: Array, queries: Array, start: int, stop: int,
    n_wanted: int, weights: Array, bonus_scales: Array, floors: Array,
) -> None:  # fmt: skip
    """Weights, scales of the bonus and floors for each tile of four queries."""
    n_heads, n_tiles, _ = floors.shape
    for task in numba.prange(n_heads * n_tiles):
        head, tile = task // n_tiles, task % n_tiles
        first = start + TILE * tile
        few = queries[head, first : min(first + TILE, stop)]
        weigh(few, maps[head], weights[head, tile], bonus_scales[head, tile])
        floors[head, tile, : len(few)] = -np.inf
        if n_keys > BUFFER * n_wanted and n_keys >= LANES * SAMPLE_STEPS[0]:
            find_floors(
                blocks[head].reshape(-1), factors[head], bonus[head], n_keys, n_wanted, weights[head, tile],
                bonus_scales[head, tile], floors[head, tile],
            )  # fmt: skip


@jit(parallel=True)
def collect(
    blocks: Array, factors: Array, bonus: Array, n_keys: int, n_wanted: int, weights: Array, bonus_scales: Array,
    floors: Array, tiles: Array, entries: Array, counts: Array,
) -> None:  # fmt: skip
    """Entries of the keys that reach the floors, chunk by chunk, for the tiles that are marked in `tiles`."""
    n_heads, n_tiles, n_chunks, _ = counts.shape
    n_blocks = (n_keys + LANES - 1) // LANES
    size = (n_blocks + n_chunks - 1) // n_chunks
    for task in numba.prange(n_heads * n_chunks):
        head, chunk = task // n_chunks, task % n_chunks
        for tile in range(n_tiles):
            if tiles[head, tile]:
                scan_blocks(
                    blocks[head].reshape(-1), factors[head], bonus[head], chunk * size,
                    min((chunk + 1) * size, n_blocks), 1, n_keys, n_wanted, weights[head, tile],
                    bonus_scales[head, tile], floors[head, tile].copy(), entries[head, tile, chunk],
                    counts[head, tile, chunk],
                )  # fmt: skip


@jit()
def weigh(queries: Array, projection: Array, weights: Array, bonus_scales: Array) -> None:
    """Up to four queries as signed bytes: their coordinates, in units of the largest over 127. See `score_block`."""
    dims = len(projection)
    signed_bytes = weights.view(np.int8)
    coordinates = np.empty(dims, np.float32)
    for row in range(len(queries)):
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
def find_floors(
    blocks: Array, factors: Array, bonus: Array, n_keys: int, n_wanted: int, weights: Array, bonus_scales: Array,
    floors: Array,
) -> None:  # fmt: skip
    """Set floors of -inf so that about n_wanted keys reach them, as every so many blocks say."""
    n_blocks = n_keys // LANES
    step = min(max(n_wanted // SAMPLE_HITS, SAMPLE_STEPS[0]), SAMPLE_STEPS[1])
    n_sampled = (n_blocks + step - 1) // step
    n_kept = n_wanted * n_sampled // n_blocks + 1
    entries = np.empty((TILE, BUFFER * n_kept), np.int64)
    counts = np.empty(TILE, np.int64)
    rising = floors.copy()
    scan_blocks(
        blocks, factors, bonus, 0, n_blocks, step, n_blocks * LANES, n_kept, weights, bonus_scales, rising, entries,
        counts,
    )  # fmt: skip
    for row in range(TILE):
        if floors[row] == -np.inf:
            keep_best(entries[row], counts[row], n_kept)
            floors[row] = score_at(order_of(entries[row, :n_kept].min()))


@jit()
def scan_blocks(
    blocks: Array, factors: Array, bonus: Array, first: int, last: int, step: int, n_keys: int, n_wanted: int,
    weights: Array, bonus_scales: Array, floors: Array, entries: Array, counts: Array,
) -> None:  # fmt: skip
    """Entries (TILE, n) of the keys in every step-th block of first..last that reach the floors.

    n > n_wanted. If more keys reach a floor it rises, and at least the n_wanted best of them are among the entries.
    """
    n_groups = len(weights) // (2 * TILE)
    size = n_groups * GROUP_BYTES
    lifted = len(bonus) > 0
    reached, keys = np.empty(WAITING, np.uint64), np.empty(WAITING, np.int64)
    scores = np.empty(WAITING * BLOCK_SCORES, np.float32)
    # While floors rise fast, blocks should not wait for long.
    n, n_most = 0, 1
    counts[:] = 0
    for block in range(first, min(last, n_keys // LANES), step):
        ahead = block + (BLOCKS_AHEAD if step == 1 else SAMPLED_AHEAD * step)
        prefetch(factors, ahead * LANES)
        for line in range(0, size, 64):
            prefetch(blocks, ahead * size + line)
        key = block * LANES
        passed = score_block(
            blocks, block * size, n_groups, weights, factors, key, lifted, bonus, key, bonus_scales, floors, scores,
            n * BLOCK_SCORES,
        )  # fmt: skip
        keys[n], reached[n] = key, passed
        n += passed != 0
        if n == n_most:
            write_entries(reached, keys, n, scores, n_wanted, floors, entries, counts)
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
    write_entries(reached, keys, n, scores, n_wanted, floors, entries, counts)


@jit()
def write_entries(
    reached: Array, keys: Array, n: int, scores: Array, n_wanted: int, floors: Array, entries: Array, counts: Array
) -> None:
    """An entry for each bit of the first n of `reached`. Full entries are cut back to the best, below the new floor."""
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
