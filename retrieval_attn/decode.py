"""One step: search the far keys, attend to what was found and to the window, estimate the rest, merge."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from retrieval_attn.estimate import FarState, estimate, within_mass, worst_scores
from retrieval_attn.index import Index, SearchResult, build_index
from retrieval_attn.kernels import AttentionState, attend_far, attend_near, merge
from retrieval_attn.memory import LayerMemory

LEAST_NORM = 1e-30


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
    """Attention of the newest tokens over everything in `memory`, the far part through the index.

    query: (1, H, T, D) of tokens already appended to `memory`; T = 1, because the window holds keys later than an
    earlier query of a block may see. Returns (1, H, T, D) and (1, H, T) on the query's device.
    """
    assert query.shape[2] == 1
    # Before the clock starts: waiting for a build, or taking in a token that left the window, is not searching.
    index = memory.index() if memory.split.n_far else None
    lap = Lap(clock)
    near = attend_near(query, memory.window.keys(), memory.window.values(), scale)
    lap.to("near")
    if index is None:
        return near
    on_host = query.detach().float().cpu()
    hits = _find(on_host, memory, index, near, scale, clock)
    lap.to("search")
    # In the query's own dtype: the output comes back in it.
    asked = query.detach().cpu()
    far = _attend(asked, memory, index, hits, scale)
    lap.to("gather")
    out = merge(near, far.state.to(query.device))
    lap.to("merge")
    _note(clock, memory, far, out)
    every = memory.config.verify_every
    if every and clock.steps % every == 0:
        _verify(on_host, memory, index, hits, near, out, scale, clock)
    return out


def _find(
    query: Tensor, memory: LayerMemory, index: Index, near: AttentionState, scale: float, clock: StepClock
) -> SearchResult:
    """What the index finds; with `mass`, as much as that takes."""
    config, n_far = memory.config, memory.split.n_far
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
        kept, suffices = within_mass(hits, scale, rest, near, config.mass, config.min_k)
        if suffices or k >= min(config.max_k, n_far):
            most = int(np.sum(kept.ids >= 0, axis=-1).max())
            memory.reach = max(config.min_k, most + most // 4)
            return kept
        k = min(2 * k, config.max_k, n_far)


def _search(query: Tensor, memory: LayerMemory, index: Index, k: int, clock: StepClock) -> SearchResult:
    hits = index.search(query[0], k, effort=memory.config.effort, seeds=memory.last_ids)
    if index.kind == "graph":
        memory.last_ids = hits.ids[:, 0]
    clock.visited += float(np.mean(hits.visited))
    clock.far += memory.split.n_far
    return hits


def _attend(query: Tensor, memory: LayerMemory, index: Index, hits: SearchResult, scale: float) -> FarState:
    config = memory.config
    return estimate(
        query, memory.far_keys(), memory.far_values(), hits, scale, estimator=config.estimator,
        tail=memory.tail() if config.estimator == "tail" else None, lift=index.lift, share_group=config.share_group,
    )  # fmt: skip


def _note(clock: StepClock, memory: LayerMemory, far: FarState, out: AttentionState) -> None:
    """Add what the step found to the clock."""
    clock.steps += 1
    memory.steps += 1
    clock.used += float(np.mean(far.n_used))
    # Of the whole: all of the window, and of the far part what was read.
    missing = (1 - far.recovered) * torch.exp(far.state.lse.cpu() - out.lse.cpu())[0]
    clock.recovered += 1 - float(missing.mean())


def _verify(
    query: Tensor, memory: LayerMemory, index: Index, hits: SearchResult, near: AttentionState, out: AttentionState,
    scale: float, clock: StepClock,
) -> None:  # fmt: skip
    """Compute the step exactly, and add to the clock how far from it the output is; the output stays as it is."""
    keys, values = memory.far_keys(), memory.far_values()
    close = AttentionState(near.out.float(), near.lse).to("cpu")
    exact = merge(close, attend_near(query, keys[None], values[None], scale))
    error = float((out.out.float().cpu() - exact.out).norm() / exact.out.norm().clamp_min(LEAST_NORM))
    clock.checks += 1
    clock.error += error
    clock.worst_error = max(clock.worst_error, error)
    lift, sampled = index.lift, memory.config.estimator == "lift"
    # Of a sample, the last key only sets the threshold, and what other heads found is not used.
    ids = hits.ids[..., :-1] if sampled and hits.ids.shape[-1] < keys.shape[1] else hits.ids
    share_group = memory.config.share_group and not sampled
    read = merge(close, attend_far(query, keys, values, ids, scale, share_group=share_group))
    clock.mass += float(torch.exp(read.lse - exact.lse).mean())
    oracle = build_index("exact", keys, seed=lift.seed if lift else 0, lift=lift.scale if lift else None)
    # A mass budget asks for as many as it kept; otherwise a head that found fewer has missed the others.
    n_wanted = np.sum(hits.ids >= 0, axis=-1) if memory.config.mass else np.full(ids.shape[:-1], hits.ids.shape[-1])
    clock.recall += share_found(hits, oracle.search(query[0], hits.ids.shape[-1]), n_wanted)


def share_found(hits: SearchResult, best: SearchResult, n_wanted: np.ndarray) -> float:
    """The share of the n_wanted (H, T) best keys that was found, over all heads; ties with the worst of them count."""
    least = np.take_along_axis(best.scores, np.maximum(n_wanted, 1)[..., None] - 1, axis=-1)
    good = (hits.scores >= least - 1e-5 * np.abs(least)) & (hits.ids >= 0)
    return float(np.mean(np.minimum(np.sum(good, axis=-1) / np.maximum(n_wanted, 1), 1)))
