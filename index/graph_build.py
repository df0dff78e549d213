"""Building the graph of one KV head from its keys and the queries of all its heads.

    lists = nearest_keys(keys, queries)              what each sampled query wants, exactly
    candidates of a key = the other keys of the lists it stands in (projection; for a query's best key: the whole list)
                        + its nearest keys in its cluster                          (keys that no query touched)
    links = prune(candidates), then reverse links, pruned again
          + a link for each list that would not lead to one of its keys
          + repair: every key can be reached

Two keys are near when the sampled queries score them alike: distances are taken in the queries' metric, where a
direction counts as much as the queries use it. After RoarGraph (arXiv 2408.08933) and RetrievalAttention
(arXiv 2409.10516); differences are noted where they are made.
"""

from typing import NamedTuple

import numba
import numpy as np

from retrieval_attn.host import Array, jit
from retrieval_attn.index.exact import scan_chunk
from retrieval_attn.index.protocol import Steps
from retrieval_attn.index.topk import best_first, offer, offer_run

# Candidates weighed per key before pruning. More costs time and changes recall little.
MAX_CANDIDATES = 192

# Cluster members each key is compared with at most; keeps a cluster of duplicates from costing its square.
MAX_CLUSTER = 1024


class HeadGraph(NamedTuple):
    """The graph of one KV head.

    links: (S, M) int32, each list padded with -1 at its end.
    hubs: (E,) int32, where every search begins; from them every key can be reached.
    anchors: (A, D) float32, sampled queries at length 1. wanted: (A, L) int32, their best keys.
    """

    links: Array
    hubs: Array
    anchors: Array
    wanted: Array


def build_head(
    keys: Array,
    queries: Array,
    *,
    degree: int,
    list_size: int,
    near: int,
    slack: float,
    n_hubs: int,
    n_anchors: int,
    n_wanted: int,
    rng: np.random.Generator,
    steps: Steps,
) -> HeadGraph:
    """keys: (S, D) float32. queries: (n, D) float32. Options as in `GraphIndex.build`."""
    lists = nearest_keys(keys, queries, min(list_size, len(keys)), steps.part(0.0, 0.5))
    points = in_query_metric(keys, queries)
    neighbours = cluster_neighbours(points, near, rng)
    steps.reached(0.6)
    n_first = max(degree * 3 // 4, 2)
    links = project(points, lists, neighbours, n_first, slack)
    steps.reached(0.8)
    links = add_reverse(points, links, n_first, degree, slack)
    steps.reached(0.95)
    connect_lists(links, lists)
    hubs = most_wanted(lists, len(keys), n_hubs)
    repair(links, hubs)
    unit = directions(queries)
    chosen = spread(unit, n_anchors, rng)
    steps.reached(1.0)
    return HeadGraph(links, hubs, unit[chosen], np.ascontiguousarray(lists[chosen, :n_wanted]))


def nearest_keys(keys: Array, queries: Array, k: int, steps: Steps) -> Array:
    """The k keys of largest inner product for each query, best first: (n, k) int32. Memory is bounded."""
    ids = np.empty((len(queries), k), np.int32)
    for first in range(0, len(queries), 512):
        rows = queries[first : first + 512]
        scores = np.empty((len(rows), k), np.float32)
        sizes = np.zeros(len(rows), np.int64)
        for block in range(0, len(keys), 16384):
            steps.reached((first + len(rows) * block / len(keys)) / len(queries))
            offer_rows(rows @ keys[block : block + 16384].T, block, scores, ids[first : first + 512], sizes)
        sort_rows(scores, ids[first : first + 512], sizes)
    return ids


@jit(parallel=True)
def offer_rows(block: Array, first_key: int, scores: Array, ids: Array, sizes: Array) -> None:
    for row in numba.prange(len(block)):
        sizes[row] = offer_run(scores[row], ids[row], sizes[row], block[row], first_key)


@jit(parallel=True)
def sort_rows(scores: Array, ids: Array, sizes: Array) -> None:
    for row in numba.prange(len(ids)):
        best_first(scores[row], ids[row], sizes[row])


def in_query_metric(keys: Array, queries: Array) -> Array:
    """Keys moved so that their squared distance is the mean square difference of their scores: (S, r) float32."""
    unit = directions(queries)
    moment = unit.T @ unit / len(unit)
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    # A floor keeps keys apart in directions that these queries happen not to use.
    values = np.maximum(values, 0.01 * values.max())
    points = (keys - keys.mean(axis=0)) @ (vectors * np.sqrt(values)).astype(np.float32)
    return np.ascontiguousarray(points)


def cluster_neighbours(points: Array, k: int, rng: np.random.Generator) -> Array:
    """Near keys of each key: k from its own cluster, k from its second nearest: (S, 2 k) int32, -1 padded."""
    n_clusters = max(1, len(points) // 256)
    owners = two_nearest(points, k_means(points, n_clusters, rng))
    order, starts = grouped(owners[:, 0], n_clusters)
    visitors, visitor_starts = grouped(owners[:, 1], n_clusters)
    found = np.full((len(points), 2, k), -1, np.int32)
    # With one more coordinate the largest inner product is the smallest distance: x.y - |y|^2 / 2.
    half = 0.5 * np.einsum("nd,nd->n", points, points)
    members = np.concatenate([points, -half[:, None]], axis=1)[order]
    search_clusters(members, points, order, starts, visitors, visitor_starts, found)
    return found.reshape(len(points), 2 * k)


def grouped(owner: Array, n_groups: int) -> tuple[Array, Array]:
    """Group c is order[starts[c] : starts[c + 1]], ascending."""
    order = np.argsort(owner, kind="stable")
    return order, np.searchsorted(owner[order], np.arange(n_groups + 1))


@jit(parallel=True)
def search_clusters(
    members: Array, points: Array, order: Array, starts: Array, visitors: Array, visitor_starts: Array, found: Array
) -> None:
    """members: the points with their extra coordinate, in the order of the clusters."""
    for cluster in numba.prange(len(starts) - 1):
        first, last = starts[cluster], starts[cluster + 1]
        guests = visitors[visitor_starts[cluster] : visitor_starts[cluster + 1]]
        n_parts = (last - first + MAX_CLUSTER - 1) // MAX_CLUSTER
        for part in range(n_parts):
            begin = first + part * MAX_CLUSTER
            end = min(begin + MAX_CLUSTER, last)
            search_cluster(members, points, order, begin, end, order[begin:end], found[:, 0])
            invited = guests[part * len(guests) // n_parts : (part + 1) * len(guests) // n_parts]
            search_cluster(members, points, order, begin, end, invited, found[:, 1])


@jit()
def search_cluster(
    members: Array, points: Array, order: Array, begin: int, end: int, askers: Array, found: Array
) -> None:
    """found[key] = the nearest of members begin..end to each asking key."""
    dim, k = points.shape[1], found.shape[1]
    asked = np.ones((len(askers), dim + 1), np.float32)
    for i in range(len(askers)):
        asked[i, :dim] = points[askers[i]]
    # One more than asked for: the nearest may be the asker itself.
    ids = np.empty((len(askers), k + 1), np.int32)
    scores = np.empty((len(askers), k + 1), np.float32)
    n = scan_chunk(members.reshape(-1), 0, dim + 1, np.empty(0, np.float32), asked, begin, end, ids, scores)
    for i in range(len(askers)):
        best_first(scores[i], ids[i], n)
        at = 0
        for j in range(n):
            key = order[ids[i, j]]
            if key != askers[i] and at < k:
                found[askers[i], at] = key
                at += 1


def k_means(points: Array, n_clusters: int, rng: np.random.Generator, iterations: int = 4) -> Array:
    """Centroids (n_clusters, r) from a sample of the points."""
    sample = points[rng.choice(len(points), min(len(points), 32 * n_clusters), replace=False)]
    centroids = sample[:n_clusters].copy()
    for _ in range(iterations):
        owner = two_nearest(sample, centroids)[:, 0]
        counts = np.bincount(owner, minlength=n_clusters)
        order = np.argsort(owner, kind="stable")
        filled = np.flatnonzero(counts)
        sums = np.add.reduceat(sample[order], (np.cumsum(counts) - counts)[filled], axis=0)
        centroids[filled] = sums / counts[filled, None]
    return centroids


def two_nearest(points: Array, centroids: Array) -> Array:
    """The nearest and the second nearest centroid of each point, (n, 2) int32."""
    out = np.zeros((len(points), 2), np.int32)
    half = 0.5 * np.einsum("nd,nd->n", centroids, centroids)
    for first in range(0, len(points), 8192):
        pick_two(points[first : first + 8192] @ centroids.T, half, out[first : first + 8192])
    return out


@jit(parallel=True)
def pick_two(affinity: Array, half: Array, out: Array) -> None:
    for i in numba.prange(len(affinity)):
        best, second = np.float32(-np.inf), np.float32(-np.inf)
        for c in range(len(half)):
            score = affinity[i, c] - half[c]
            if score > second:
                if score > best:
                    second = best
                    out[i, 1] = out[i, 0]
                    best = score
                    out[i, 0] = c
                else:
                    second = score
                    out[i, 1] = c


def project(points: Array, lists: Array, neighbours: Array, degree: int, slack: float) -> Array:
    """First links of every key, (S, degree): from the lists it stands in and from its neighbours.

    RoarGraph gives links only to each query's best key and lets a later query overwrite an earlier one. Attention
    queries share best keys, so lists are merged; and every key of a list gets links, so that one that enters the list
    anywhere finds the rest.
    """
    n, k = lists.shape
    # Column by column: the places of a key then come best rank first.
    starts, places = invert(lists.T.ravel(), len(points))
    links = np.full((len(points), degree), -1, np.int32)
    link_keys(points, lists, starts, (places % n) * k + places // n, neighbours, slack, links)
    return links


@jit(parallel=True)
def link_keys(
    points: Array, lists: Array, starts: Array, places: Array, neighbours: Array, slack: float, links: Array
) -> None:
    n_keys, list_size = len(points), lists.shape[1]
    for key in numba.prange(n_keys):
        found = np.empty(MAX_CANDIDATES, np.int32)
        n = 0
        for other in neighbours[key, : MAX_CANDIDATES // 2]:
            if other >= 0:
                found[n] = other
                n += 1
        for other in (key - 1, key + 1):
            if 0 <= other < n_keys:
                found[n] = other
                n += 1
        n_lists = starts[key + 1] - starts[key]
        # Few lists give all they have, many give their part.
        room = (MAX_CANDIDATES - n) // max(min(n_lists, 8), 1)
        for at in range(starts[key], starts[key + 1]):
            query, rank = places[at] // list_size, places[at] % list_size
            first = max(0, min(rank - room // 2, list_size - room))
            for other in lists[query, first : min(first + room, list_size)]:
                if other >= 0 and n < MAX_CANDIDATES:
                    found[n] = other
                    n += 1
            if n == MAX_CANDIDATES:
                break
        prune(points, key, found[:n], slack, links[key])


@jit()
def prune(points: Array, key: int, candidates: Array, slack: float, out: Array) -> int:
    """Fill out with the nearest candidates that no nearer link already leads to, then with the nearest of the rest.

    Returns how many links were written.
    """
    unique = np.unique(candidates)
    n = len(unique)
    scores = np.empty(n, np.float32)
    ids = np.empty(n, np.int32)
    size = 0
    for other in unique:
        if other != key:
            size = offer(scores, ids, size, -distance(points[key], points[other]), other)
    best_first(scores, ids, size)
    n_kept = 0
    for i in range(size):
        other = ids[i]
        hidden = False
        for j in range(n_kept):
            # Distances are squared; scores hold them with a minus sign. Of equal keys the first hides the rest.
            if slack * distance(points[out[j]], points[other]) <= -scores[i]:
                hidden = True
                break
        if not hidden:
            out[n_kept] = other
            n_kept += 1
            ids[i] = -1
            if n_kept == len(out):
                return n_kept
    for i in range(size):
        if n_kept == len(out):
            break
        if ids[i] >= 0:
            out[n_kept] = ids[i]
            n_kept += 1
    return n_kept


@jit()
def distance(a: Array, b: Array) -> float:
    """Squared distance."""
    total = (a[0] - b[0]) * (a[0] - b[0])
    for d in range(1, len(a)):
        total += (a[d] - b[d]) * (a[d] - b[d])
    return total


def add_reverse(points: Array, links: Array, n_kept: int, degree: int, slack: float) -> Array:
    """Links both ways, pruned to n_kept again: (S, degree). The slots after them are free."""
    n_keys, width = links.shape
    starts, places = invert(links.ravel(), n_keys)
    both = np.full((n_keys, degree), -1, np.int32)
    merge_links(points, links, starts, (places // width).astype(np.int32), slack, both[:, :n_kept])
    return both


def invert(targets: Array, n_keys: int) -> tuple[Array, Array]:
    """The places of key s in `targets` (-1 skipped) are places[starts[s] : starts[s + 1]], ascending."""
    order = np.argsort(targets, kind="stable")
    order = order[np.searchsorted(targets[order], 0) :]
    return np.searchsorted(targets[order], np.arange(n_keys + 1)), order


@jit(parallel=True)
def merge_links(points: Array, links: Array, starts: Array, sources: Array, slack: float, out: Array) -> None:
    for key in numba.prange(len(points)):
        found = np.empty(MAX_CANDIDATES, np.int32)
        n = 0
        for other in links[key]:
            if other >= 0:
                found[n] = other
                n += 1
        incoming = sources[starts[key] : starts[key + 1]]
        step = max(1, len(incoming) // (MAX_CANDIDATES - n))
        for i in range(0, len(incoming), step):
            if n < MAX_CANDIDATES:
                found[n] = incoming[i]
                n += 1
        prune(points, key, found[:n], slack, out[key])


@jit()
def connect_lists(links: Array, lists: Array) -> None:
    """Give every key of every list a link from another key of that list, so that a search that meets the list finds it.

    A key wanted in several contexts has its near keys in one of them; its other lists would not lead to it. The link
    comes from the key nearest in rank that has two slots free; one slot of each key is left for `repair`.
    """
    n_links, size = links.shape[1], lists.shape[1]
    rank_of = np.full(len(links), -1, np.int32)
    linked = np.empty(size, np.bool_)
    for row in lists:
        for rank in range(size):
            rank_of[row[rank]] = rank
        linked[:] = False
        for rank in range(size):
            for j in range(n_links):
                other = links[row[rank], j]
                if other < 0:
                    break
                if rank_of[other] >= 0:
                    linked[rank_of[other]] = True
        for rank in range(size):
            for away in range(1, size):
                if linked[rank]:
                    break
                for host in (rank - away, rank + away):
                    if 0 <= host < size and not linked[rank] and has_spare(links[row[host]]):
                        append_link(links[row[host]], row[rank])
                        linked[rank] = True
        for rank in range(size):
            rank_of[row[rank]] = -1


def most_wanted(lists: Array, n_keys: int, n: int) -> Array:
    """The keys that are most often the best of a sampled query, at most n; ties to the smaller id."""
    counts = np.bincount(lists[:, 0], minlength=n_keys)
    order = np.argsort(-counts, kind="stable")[:n]
    return np.ascontiguousarray(order[counts[order] > 0]).astype(np.int32)


def directions(x: Array) -> Array:
    """The rows of x at length 1 (zero rows stay zero)."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def spread(unit: Array, n: int, rng: np.random.Generator) -> Array:
    """Indices of at most n rows that stand for the rest: those nearest to the rows' centroids."""
    n = min(n, len(unit))
    centroids = k_means(unit, n, rng)
    return np.argmax(unit @ centroids.T - 0.5 * np.einsum("nd,nd->n", centroids, centroids), axis=0)


@jit()
def repair(links: Array, hubs: Array) -> int:
    """Make every key reachable from the hubs. Returns how many links that took.

    An unreached key is hung below a reached key that it links to itself, or else below the reached key before it in
    the document, or else below any with a free slot. One exists: each list keeps a slot free until a key is hung
    there, and each hung key brings its own.
    """
    n_keys = len(links)
    reached = np.zeros(n_keys, np.bool_)
    stack = np.empty(n_keys, np.int32)
    for hub in hubs:
        if hub >= 0 and not reached[hub]:
            reached[hub] = True
            reach(links, hub, reached, stack)
    n_added = 0
    roomy = 0
    before = hubs[0]
    for key in range(n_keys):
        if not reached[key]:
            host = -1
            for other in links[key]:
                if other >= 0 and reached[other] and has_room(links[other]):
                    host = other
                    break
            if host < 0 and has_room(links[before]):
                host = before
            if host < 0:
                while not (reached[roomy] and has_room(links[roomy])):
                    roomy = (roomy + 1) % n_keys
                host = roomy
            append_link(links[host], key)
            reached[key] = True
            reach(links, key, reached, stack)
            n_added += 1
        before = key
    return n_added


@jit()
def reach(links: Array, start: int, reached: Array, stack: Array) -> None:
    """Mark all that can be reached from `start`, which is marked already."""
    stack[0] = start
    n = 1
    while n:
        n -= 1
        for other in links[stack[n]]:
            if other >= 0 and not reached[other]:
                reached[other] = True
                stack[n] = other
                n += 1


@jit()
def has_room(row: Array) -> bool:
    return row[len(row) - 1] < 0


@jit()
def has_spare(row: Array) -> bool:
    """Whether a slot is free besides the one that is left for `repair`."""
    return row[len(row) - 2] < 0


@jit()
def append_link(row: Array, key: int) -> None:
    for j in range(len(row)):
        if row[j] < 0:
            row[j] = key
            break
