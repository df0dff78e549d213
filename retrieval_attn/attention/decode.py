"""One step: search the far keys, attend to what was found and to the window, estimate the rest, merge."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.attention.layer_memory import LayerMemory
from retrieval_attn.far.estimators import FarState, estimate_attention, within_mass, worst_scores
from retrieval_attn.far.far_index import Far
from retrieval_attn.index import Index, SearchResult, build_index
from retrieval_attn.kernels import AttentionState, attend_dense, attend_far, attend_near, merge

LEAST_NORM = 1e-30

# Attention that needs no search: over the window, on its device, and over the newest far keys, in CPU memory.
Pair = tuple[AttentionState, AttentionState]


@dataclass(frozen=True)
class Searched:
    """What one step has searched: the index, all far keys, what was found, and what it attends to without a search."""

    index: Index
    far: Far
    hits: SearchResult
    anyway: Pair


@dataclass
class StepClock:
    """What decode steps cost and found; adds up until it is reset.

    near, search, gather, merge: seconds. visited, far: keys looked at, and keys there were, per query head, over all
    searches (a mass budget may take several a step). steps: how many. used, recovered: keys read per query head, and
    the share of the attention mass that they hold with the window, by estimate. checks: steps that were verified;
    error, worst_error, recall, mass: over them the sum of the output's relative errors and the largest, the sums of the
    recall and of the true share of the mass.
    """

    near: float = 0.0
    search: float = 0.0
    gather: float = 0.0
    merge: float = 0.0
    visited: float = 0.0
    far: float = 0.0
    steps: int = 0
    used: float = 0.0
    recovered: float = 0.0
    checks: int = 0
    error: float = 0.0
    worst_error: float = 0.0
    recall: float = 0.0
    mass: float = 0.0

    @property
    def visited_fraction(self) -> float:
        """Share of the far keys whose vector or code was read, averaged over heads, layers and steps."""
        return self.visited / self.far if self.far else 0.0


@dataclass
class Lap:
    """Stopwatch whose laps add to the fields of a clock. Device work counts where it is waited for."""

    clock: StepClock
    started: float = field(default_factory=time.perf_counter)

    def to(self, part: str) -> None:
        """Charge the time since the last lap to `part`."""
        now = time.perf_counter()
        setattr(self.clock, part, getattr(self.clock, part) + now - self.started)
        self.started = now


def decode(query: Tensor, memory: LayerMemory, scale: float, clock: StepClock) -> AttentionState:
    """Attention of the newest token over everything in `memory`, the far part through the index.

    query: (1, H, 1, D) of a token already appended to `memory`; several at once go to `decode_block`. Returns
    (1, H, 1, Dv) and (1, H, 1) on the query's device.
    """
    assert query.shape[2] == 1
    # Before the clock starts: waiting for a build, or taking in keys that left the window, is not searching.
    index = memory.index()
    lap = Lap(clock)
    near = attend_near(query, memory.window.keys(), memory.window.values(), scale)
    lap.to("near")
    return _with_far(query, memory, index, near, scale, lap) if memory.split.n_far else near


def decode_block(
    query: Tensor, keys: Tensor, values: Tensor, memory: LayerMemory, scale: float, clock: StepClock
) -> AttentionState:
    """As `decode` for the next T tokens at once, which are appended to `memory` afterwards.

    query (1, H, T, D), keys (1, G, T, D), values (1, G, T, Dv). What was near before them stays near to all of them.
    """
    index = memory.index()
    lap = Lap(clock)
    # In the window order is lost, and none is needed: all of it is before the block.
    close = [torch.cat(pair, dim=2) for pair in ((memory.window.keys(), keys), (memory.window.values(), values))]
    out = attend_dense(query, close[0], close[1], scale, causal=True)
    lap.to("near")
    if memory.split.n_far:
        out = _with_far(query, memory, index, out, scale, lap)
    memory.append(query, keys, values)
    return out


def _with_far(
    query: Tensor, memory: LayerMemory, index: Index | None, near: AttentionState, scale: float, lap: Lap
) -> AttentionState:
    """Merge the near state with the far keys: those that the index covers are searched, the newest are read."""
    store, clock, far = memory.store, lap.clock, memory.far()
    newest = far.after(0 if index is None else index.n_keys)
    # Stored rows may be integers, which take other queries, and give other outputs.
    on_host = store.folded(query.detach().float().cpu())
    read = state = attend_near(on_host, newest.keys[None], newest.values[None], scale)
    lap.to("gather")
    hits = found = None
    if index is not None:
        hits = find_far(on_host, memory, index, (near, read), scale, clock)
        lap.to("search")
        found = attend_found(on_host, memory, index, far.before(index.n_keys), hits, scale)
        state = merge(found.state, read)
    state = state._replace(out=store.unfolded(state.out).to(near.out.dtype)).to(query.device)
    lap.to("gather")
    out = merge(near, state)
    lap.to("merge")
    _note(clock, memory, found, newest.length, out)
    every = memory.config.verify_every
    # Of this sequence, whose memory it is: the clock counts the steps of all rows of a batch.
    if every and hits is not None and index is not None and memory.steps % every == 0:
        _verify(on_host, memory, Searched(index, far, hits, (near, read)), out, scale, clock)
    return out


def find_far(
    query: Tensor, memory: LayerMemory, index: Index, anyway: Pair, scale: float, clock: StepClock
) -> SearchResult:
    """Search the index for `top_k` keys, or with `mass` for as many as it takes.

    anyway: attention over the window and the newest far keys, which counts towards the mass.
    """
    config, n_far = memory.config, index.n_keys
    k = min(config.top_k + (config.estimator == "lift"), n_far)
    if config.mass is None:
        return _search(query, memory, index, k, clock)
    # What the last step needed is where this one begins.
    k = min(max(memory.reach or k, config.min_k), config.max_k, n_far)
    while True:
        hits = _search(query, memory, index, k, clock)
        n_found = np.sum(hits.ids >= 0, axis=-1)
        threshold = torch.from_numpy(worst_scores(hits, scale, n_found))
        rest = memory.tail().attend_rest(query, threshold, torch.from_numpy(n_found), scale)
        kept, suffices = within_mass(hits, scale, rest, anyway, config.mass, config.min_k)
        if suffices or k >= min(config.max_k, n_far):
            most = int(np.sum(kept.ids >= 0, axis=-1).max())
            memory.reach = max(config.min_k, most + most // 4)
            return kept
        k = min(2 * k, config.max_k, n_far)


def _search(query: Tensor, memory: LayerMemory, index: Index, k: int, clock: StepClock) -> SearchResult:
    hits = index.search(query[0], k, effort=memory.config.effort, seeds=memory.last_ids)
    if index.kind == "graph":
        memory.last_ids = hits.ids[:, -1]
    clock.visited += float(np.mean(hits.visited))
    clock.far += index.n_keys
    return hits


def attend_found(
    query: Tensor, memory: LayerMemory, index: Index, covered: Far, hits: SearchResult, scale: float
) -> FarState:
    """Attention over the far keys that an index covers, from what it found, as the config's estimator has it."""
    config = memory.config
    return estimate_attention(
        query,
        *covered,
        hits,
        scale,
        estimator=config.estimator,
        tail=memory.tail() if config.estimator == "tail" else None,
        lift=index.lift,
        share_group=config.share_group,
    )


def _note(clock: StepClock, memory: LayerMemory, found: FarState | None, n_newest: int, out: AttentionState) -> None:
    """Add what the step found, beside the newest far keys, to the clock."""
    clock.steps += 1
    memory.steps += 1
    clock.visited += n_newest
    clock.far += n_newest
    clock.used += n_newest
    clock.recovered += 1
    if found is not None:
        clock.used += float(np.mean(found.n_used))
        missing = (1 - found.recovered) * found.state.share_of(out)[0]
        clock.recovered -= float(missing.mean())


def _verify(
    query: Tensor, memory: LayerMemory, searched: Searched, out: AttentionState, scale: float, clock: StepClock
) -> None:
    """Compute the step exactly, and add to the clock how far from it the output is; the output stays as it is."""
    index, far, hits, anyway = searched.index, searched.far, searched.hits, searched.anyway
    near, (keys, values) = anyway[0].to("cpu"), far.before(index.n_keys)
    whole = attend_near(query, far.keys[None], far.values[None], scale)
    whole = whole._replace(out=memory.store.unfolded(whole.out))
    exact = merge(near._replace(out=near.out.float()), whole)
    error = float((out.out.float().cpu() - exact.out).norm() / exact.out.norm().clamp_min(LEAST_NORM))
    clock.checks += 1
    clock.error += error
    clock.worst_error = max(clock.worst_error, error)
    lift, sampled = index.lift, memory.config.estimator == "lift"
    # Of a sample, the last key only sets the threshold, and what other heads found is not used.
    ids = hits.ids[..., :-1] if sampled and hits.ids.shape[-1] < keys.shape[1] else hits.ids
    share_group = memory.config.share_group and not sampled
    read = attend_far(query, keys, values, ids, scale, share_group=share_group)
    clock.mass += sum(float(state.share_of(exact).mean()) for state in (read, near, anyway[1]))
    oracle = build_index("exact", keys, seed=lift.seed if lift else 0, lift=lift.scale if lift else None)
    # A mass budget asks for as many as it kept; otherwise a head that found fewer has missed the others.
    n_wanted = np.sum(hits.ids >= 0, axis=-1) if memory.config.mass else np.full(ids.shape[:-1], hits.ids.shape[-1])
    clock.recall += share_found(hits, oracle.search(query[0], hits.ids.shape[-1]), n_wanted)


def share_found(hits: SearchResult, best: SearchResult, n_wanted: np.ndarray) -> float:
    """The share of the n_wanted (H, T) best keys that was found, over all heads; ties with the worst of them count."""
    least = np.take_along_axis(best.scores, np.maximum(n_wanted, 1)[..., None] - 1, axis=-1)
    good = (hits.scores >= least - 1e-5 * np.abs(least)) & (hits.ids >= 0)
    return float(np.mean(np.minimum(np.sum(good, axis=-1) / np.maximum(n_wanted, 1), 1)))
