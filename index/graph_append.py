"""Linking new keys into a graph that is already being searched, and forgetting the newest.

Links are written in place while searches read them. Every entry is always a valid id or -1 and searches skip ids that
are newer than they are, so a search sees, at worst, a list half before and half after. A key may be cut off while the
batch is linked; `repair` then brings it back.
"""

import numba
import numpy as np

from retrieval_attn.host import Array, jit
from retrieval_attn.index.dots import dot, read_key, squared_distance
from retrieval_attn.index.graph_build import append_link, has_spare, repair
from retrieval_attn.index.graph_search import search_one
from retrieval_attn.index.topk import offer

# Beam of the search for a new key's neighbours.
LINK_EFFORT = 128
SLACK = 1.4


@jit(parallel=True)
def link_new(
    values: Array, stride_g: int, stride_s: int, first: int, last: int, links: Array, hubs: Array, anchors: Array,
    wanted: Array,
) -> None:  # fmt: skip
    """Link keys first..last of every head; keys before `first` are linked."""
    for head in numba.prange(len(links)):
        for key in range(first, last):
            link_key(values, head * stride_g, stride_s, key, links[head], hubs[head], anchors[head], wanted[head])
        repair(links[head, :last], hubs[head])


@jit(parallel=True)
def forget(links: Array, hubs: Array, wanted: Array, n_keys: int) -> Array:
    """A copy of the links between keys 0..n_keys; ids from n_keys on also leave `hubs` and `wanted`, in place."""
    kept = np.full((len(links), n_keys, links.shape[2]), np.int32(-1))
    for head in numba.prange(len(links)):
        for key in range(n_keys):
            copy_below(links[head, key], n_keys, kept[head, key])
        for lists in (hubs[head : head + 1], wanted[head]):
            for row in lists:
                copy_below(row.copy(), n_keys, row)
        if hubs[head, 0] < 0:
            hubs[head, 0] = 0
        repair(kept[head], hubs[head])
    return kept


@jit()
def copy_below(row: Array, n_keys: int, out: Array) -> None:
    """out = the ids of `row` that are below n_keys, in order, then -1."""
    n = 0
    for other in row:
        if 0 <= other < n_keys:
            out[n] = other
            n += 1
    out[n:] = -1


@jit()
def link_key(
    values: Array, base: int, stride: int, key: int, links: Array, hubs: Array, anchors: Array, wanted: Array
) -> None:
    """Give `key` links to near keys, and near keys a link to it.

    Candidates: the nearest keys found by a search that begins at its predecessors and at what similar keys' queries
    wanted; and those wanted keys themselves, since the new key will be wanted with them.
    """
    point = np.empty(anchors.shape[1], np.float32)
    read_key(values, base + key * stride, point)
    picks = keenest(values, base, stride, point, anchors, wanted)
    starts = np.concatenate((np.arange(max(0, key - 4), key).astype(np.int32), hubs, wanted[picks].ravel()))
    found = np.empty(LINK_EFFORT, np.int32)
    scores = np.empty(LINK_EFFORT, np.float32)
    search_one(values, base, stride, key, links, starts, point, True, LINK_EFFORT, found, scores)
    row = links[key]
    row[:] = -1
    # Half the slots stay free for links to later keys: filling them made later recall worse, not better.
    n_links = diverse(values, base, stride, len(point), found, scores, SLACK, row[: len(row) // 2])
    for j in range(n_links):
        link_back(values, base, stride, row[j], key, point, links)
    for pick in picks:
        for host in wanted[pick, :8]:
            if host >= 0:
                link_back(values, base, stride, host, key, point, links)


@jit()
def keenest(values: Array, base: int, stride: int, point: Array, anchors: Array, wanted: Array) -> Array:
    """The two stored queries that want `point` most, compared with the best key they have."""
    n = min(2, len(anchors))
    scores = np.empty(n, np.float32)
    ids = np.empty(n, np.int32)
    size = 0
    for a in range(len(anchors)):
        if wanted[a, 0] < 0:
            continue
        best = dot(values, base + wanted[a, 0] * stride, anchors[a])
        size = offer(scores, ids, size, dot(point, 0, anchors[a]) - best, a)
    return ids[:size]


@jit()
def diverse(
    values: Array, base: int, stride: int, dim: int, found: Array, scores: Array, slack: float, out: Array
) -> int:
    """Fill out with the keys, nearest first, that no nearer one leads to, then with the rest. Returns how many."""
    n = 0
    point = np.empty(dim, np.float32)
    hidden = np.zeros(len(found), np.bool_)
    for i in range(len(found)):
        if found[i] < 0 or n == len(out):
            break
        read_key(values, base + found[i] * stride, point)
        for j in range(n):
            if slack * squared_distance(values, base + out[j] * stride, point) <= -scores[i]:
                hidden[i] = True
                break
        if not hidden[i]:
            out[n] = found[i]
            n += 1
    for i in range(len(found)):
        if n < len(out) and hidden[i]:
            out[n] = found[i]
            n += 1
    return n


@jit()
def link_back(values: Array, base: int, stride: int, host: int, key: int, point: Array, links: Array) -> None:
    """Give `host` a link to `key`: in a free slot, or in place of its longest link if that is longer."""
    row = links[host]
    for other in row:
        if other == key:
            return
    if has_spare(row):
        append_link(row, key)
        return
    home = np.empty(len(point), np.float32)
    read_key(values, base + host * stride, home)
    farthest, slot = squared_distance(values, base + key * stride, home), -1
    for j in range(len(row)):
        if row[j] >= 0:
            distance = squared_distance(values, base + row[j] * stride, home)
            if distance > farthest:
                farthest, slot = distance, j
    if slot >= 0:
        row[slot] = key
