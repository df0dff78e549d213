"""One step: search the far keys, attend to what was found and to the window, merge."""

import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from retrieval_attn.index import Index
from retrieval_attn.kernels import AttentionState, attend_far, attend_near, merge
from retrieval_attn.memory import LayerMemory


@dataclass
class StepClock:
    """Seconds spent in the parts of decode steps, and how many keys were looked at; adds up until it is reset."""

    near: float = 0.0
    search: float = 0.0
    gather: float = 0.0
    merge: float = 0.0
    visited: float = 0.0
    far: float = 0.0

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
    far = _attend_far(query, memory, index, scale, clock, lap)
    out = merge(near, far.to(query.device))
    lap.to("merge")
    return out


def _attend_far(
    query: Tensor, memory: LayerMemory, index: Index, scale: float, clock: StepClock, lap: Lap
) -> AttentionState:
    config = memory.config
    on_host = query[0].detach().float().cpu()
    hits = index.search(on_host, min(config.top_k, memory.split.n_far), effort=config.effort)
    clock.visited += float(np.mean(hits.visited))
    clock.far += memory.split.n_far
    lap.to("search")
    state = attend_far(
        query.detach().cpu(), memory.far_keys(), memory.far_values(), hits.ids, scale, share_group=config.share_group
    )
    lap.to("gather")
    return state
