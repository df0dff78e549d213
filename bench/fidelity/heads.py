"""How near each head's attention comes to exact attention, for queries that taught no index; rows of `bench fidelity`.

Each query goes alone over the context that was read, as in a step of decoding, but with no token added: so every query
meets the same keys, and exact attention over them is computed once for all methods.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.arrays import Array

# The very search and estimate of decode steps, with their seeds and budgets: others might be better, or worse.
from retrieval_attn.attention.decode import LEAST_NORM, StepClock, attend_found, find_far, share_found
from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.bench.fidelity.held_out import Held
from retrieval_attn.bench.fidelity.planted import plant
from retrieval_attn.bench.methods.named import Method
from retrieval_attn.bench.methods.ours import build_hnsw
from retrieval_attn.far.far_index import n_covered
from retrieval_attn.hf.cache import RetrievalCache
from retrieval_attn.hf.layer import RetrievalLayer
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.index import Index, SearchResult, build_index
from retrieval_attn.index.lift import Lift
from retrieval_attn.kernels import AttentionState, attend_far, attend_near, merge
from retrieval_attn.llm import LLM

# Two ways of summing an inner product differ by less than this part of the lengths' product.
ROUNDING = 1e-4

# Of one query head, means over its queries: error, mass, and recall, which is None if there was nothing to search.
Head = tuple[float, float, float | None]


class Step(NamedTuple):
    """One query over a memory: the output (H, Dv) float32, the log of the mass of what was read (H,), and what a search
    found; None without an index."""

    out: Tensor
    lse: Tensor
    hits: SearchResult | None


def step(query: Tensor, memory: LayerMemory, index: Index | None, window_alone: bool = False) -> Step:
    """A decode step over the tokens of `memory`, to which nothing is added; query (H, 1, D) in the model's dtype."""
    config, scale, far = memory.config, memory.scale, memory.far()
    near = attend_near(query[None].to(memory.window.device), memory.window.keys(), memory.window.values(), scale)
    if window_alone or far.length == 0:
        return Step(near.out[0, :, 0].float().cpu(), near.lse[0, :, 0].cpu(), None)
    on_host = memory.store.folded(query[None].float())
    newest = far.after(0 if index is None else index.n_keys)
    state = rest = attend_near(on_host, newest.keys[None], newest.values[None], scale)
    lse, hits = torch.logaddexp(near.lse.cpu(), rest.lse), None
    if index is not None:
        hits, covered = find_far(on_host, memory, index, (near, rest), scale, StepClock()), far.before(index.n_keys)
        state = merge(attend_found(on_host, memory, index, covered, hits, scale).state, rest)
        # What a sample's heads found is not shared.
        share_group = config.share_group and index.lift is None
        read = attend_far(on_host, *covered, used(hits, index), scale, share_group=share_group)
        lse = torch.logaddexp(lse, read.lse)
    far_state = AttentionState(memory.store.unfolded(state.out).to(near.out), state.lse.to(near.lse))
    return Step(merge(near, far_state).out[0, :, 0].float().cpu(), lse[0, :, 0], hits)


def used(hits: SearchResult, index: Index) -> Array:
    """The ids (H, 1, k) that attention reads: of a sample, the last key only sets the threshold."""
    is_threshold = index.lift is not None and hits.ids.shape[-1] < index.n_keys
    return hits.ids[..., :-1] if is_threshold else hits.ids


def measure(held: Held, memory: LayerMemory, index: Index | None, window_alone: bool) -> list[Head]:
    """Every held-out query over a memory of the context, one after the other."""
    queries = held.queries.split(1, dim=1)
    steps = [step(query, memory, index, window_alone) for query in queries]
    outs, lses = (torch.stack([getattr(one, name) for one in steps], dim=1) for name in ("out", "lse"))
    error = (outs - held.out).norm(dim=-1) / held.out.norm(dim=-1).clamp_min(LEAST_NORM)
    if not error.isfinite().all():
        raise ValueError("the output of attention holds NaN or infinity")
    # Above 1 it is rounding.
    mass = (lses - held.lse).exp().clamp_max(1)
    recall: list[Any] = [0.0 if window_alone and memory.split.n_far else None] * len(error)
    if index is not None:
        recall = _recall(queries, [one.hits for one in steps if one.hits is not None], memory, index)
    return list(zip(error.mean(1).tolist(), mass.mean(1).tolist(), recall, strict=True))


def _recall(queries: Sequence[Tensor], found: Sequence[SearchResult], memory: LayerMemory, index: Index) -> list[float]:
    """For each head, the share of the best keys that was found; under a mass budget, of as many as were kept."""
    lift, keys = index.lift, memory.far().before(index.n_keys).keys
    oracle = build_index("exact", keys, seed=lift.seed if lift else 0, lift=lift.scale if lift else None)
    shares = []
    for query, hits in zip(queries, found, strict=True):
        asked = np.full(hits.ids.shape[:-1], hits.ids.shape[-1])
        wanted = asked if memory.config.mass is None else np.sum(hits.ids >= 0, axis=-1)
        best, true = oracle.search(query.float(), hits.ids.shape[-1]), _truthful(query, hits, keys, lift)
        heads = [slice(h, h + 1) for h in range(len(wanted))]
        shares.append([share_found(_of(true, h), _of(best, h), wanted[h]) for h in heads])
    return np.mean(shares, axis=0).tolist()


def _truthful(query: Tensor, hits: SearchResult, keys: Tensor, lift: Lift | None) -> SearchResult:
    """Without the hits whose score is not their key's: what an index says of itself is not taken for granted."""
    ids = hits.ids[:, 0].clip(0)
    group = np.repeat(np.arange(len(keys)), len(ids) // len(keys))[:, None]
    rows = keys[torch.from_numpy(group), torch.from_numpy(ids)].float()
    scores = (rows * query.float()).sum(-1).numpy() + (lift.bonuses(keys.shape[1])[group, ids] if lift else 0)
    allowed = ROUNDING * query.float().norm(dim=-1) * rows.norm(dim=-1)
    return hits._replace(ids=np.where(np.abs(scores - hits.scores[:, 0]) <= allowed.numpy(), ids, -1)[:, None])


def _of(hits: SearchResult, heads: slice) -> SearchResult:
    return SearchResult(*(part[heads] for part in hits))


def _hit(held: Held, memory: LayerMemory, index: Index, planted: Array) -> Array:
    """For each head and query (H, N), whether a search that begins anew finds its planted key."""
    hit = np.zeros(planted.shape, bool)
    for t in np.flatnonzero((planted >= 0).any(axis=0)):
        memory.forget_step()
        hits = step(held.queries[:, t : t + 1], memory, index).hits
        assert hits is not None
        hit[:, t] = (used(hits, index)[:, 0] == planted[:, t, None]).any(axis=1)
    return hit


@torch.no_grad()
def hold_out(model: Any, cache: RetrievalCache, asking: list[int]) -> list[Held]:
    """Let the model read on after the context, exactly, in a fork; the queries of these tokens taught nothing."""
    twin = cache.fork()
    with twin.working(), twin.exact():
        tokens = torch.tensor([asking], device=model.device)
        model.base_model(input_ids=tokens, **cache_argument(twin), use_cache=True)
        queries = [memory.sample.queries()[:, -len(asking) :] for memory in twin.memories]
        return [Held.of(*pair) for pair in zip(queries, cache.memories, strict=True)]


def measure_cache(cache: RetrievalCache, method: Method, held: list[Held]) -> list[Head]:
    """Every head of every layer, in order. cache: of the context, with the method's options."""
    with cache.working():
        each = zip(held, cache.memories, indexes(cache, method), strict=True)
        return [head for one in each for head in measure(*one, window_alone=method.name == "streaming")]


def find_planted(cache: RetrievalCache, method: Method, held: list[Held], most: int, seed: int) -> list[float | None]:
    """As `measure_cache`: the share of planted keys, `most` per head, that is found; None without any. They are written
    into `cache`, which is of no use then."""
    found: list[float | None] = []
    with cache.working():
        planted = [
            plant(one, memory, n_covered(memory.split.n_far), most, seed)
            for one, memory in zip(held, cache.memories, strict=True)
        ]
        for one, memory, index, ids in zip(held, cache.memories, indexes(cache, method), planted, strict=True):
            hit = np.zeros(ids.shape, bool) if index is None else _hit(one, memory, index, ids)
            found += [float(hit[h, row >= 0].mean()) if (row >= 0).any() else None for h, row in enumerate(ids)]
    return found


def layers_and_heads(llm: LLM) -> list[tuple[int, int]]:
    """What has a row: the layers that are ours, and their query heads."""
    layers = [i for i, layer in enumerate(llm.new_cache().layers) if isinstance(layer, RetrievalLayer)]
    heads = llm.model.config.get_text_config(decoder=True).num_attention_heads
    return [(layer, head) for layer in layers for head in range(heads)]


def indexes(cache: RetrievalCache, method: Method) -> Iterator[Index | None]:
    """What each memory of the cache is searched by, built as it is asked for; None if there is nothing to search.

    Raises RuntimeError if it cannot be built: the runtime would search exactly then, which is not what was asked for.
    """
    if method.name == "hnsw":
        build_hnsw(cache)
    for memory in cache.memories:
        index = None if method.name == "streaming" else memory.index()
        if index is not None and index.kind == "exact" != memory.choice().kind:
            raise RuntimeError(memory.far_index.reason)
        yield index
