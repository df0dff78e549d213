"""Prefill of one layer, timed a chunk of queries at a time at a few places of the prompt, each method in turn."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrieval_attn.bench.kernels.methods import Chunk, Result, Run, density_of, methods
from retrieval_attn.bench.kernels.rows import SQUARE, Limits, blank_row, set_check, set_shares, set_times
from retrieval_attn.bench.kernels.timing import seconds
from retrieval_attn.bench.kernels.truth import Truth, Verdict, judge, truth_of
from retrieval_attn.bench.shared.failures import Failing
from retrieval_attn.bench.shared.machine import require_memory
from retrieval_attn.bench.shared.report import Row
from retrieval_attn.bench.vectors.prefill import Prompt

# Places of a long prompt where a chunk is timed: at these shares of its length.
PLACES = (0.25, 0.5, 0.75, 1.0)

# The whole prompt in one call of sdpa is left out where it would take longer than this.
MOST_SECONDS = 20.0


class Plan(NamedTuple):
    """How a prompt is measured. device, repeat, chunk: as of `Options`; mass: of "auto"; advance: told what is next."""

    patterns: tuple[str, ...]
    mass: float
    chunk: int
    repeat: int
    device: str
    limits: Limits
    advance: Callable[[str], None]


class Shot(NamedTuple):
    """One method at one place of the prompt: seconds by turn, share of the pairs read, and how right it was."""

    seconds: list[float]
    density: float
    verdict: Verdict


def require_room(S: int, H: int, G: int, D: int, size: int) -> None:
    """Raise MemoryError unless the vectors of a prompt, and what making them takes, fit into memory."""
    require_memory(S * D * (2 * H + 2 * G) * size + 8 * S * D * H, f"a prompt of {S} tokens")


def measure_prompt(plan: Plan, prompt: Prompt) -> Iterator[Row]:
    """A row per method; one that cannot be measured gives a row that says why."""
    S = prompt.query.shape[2]
    tensors = Prompt(*(x.to(plan.device) for x in prompt))
    stops = places(S, plan.chunk)
    chunks = [_chunk(tensors, stop, plan.chunk) for stop in stops]
    rows = {name: blank_row(S, name) for name in methods(plan.patterns, plan.mass, plan.device)}
    shots: dict[str, list[Shot]] = {name: [] for name in rows}
    with torch.no_grad():
        for i, chunk in enumerate(chunks):
            plan.advance(f"{S} tokens, chunk {i + 1} of {len(chunks)}")
            _shoot(plan, chunk, rows, shots, warm=i == 0 or plan.device != "cpu")
        for name, row in rows.items():
            if not row["reason"]:
                _summarise(row, plan, tensors, stops, shots[name])
        if rows["sdpa"]["status"] == "ok":
            plan.advance(f"{S} tokens, sdpa in one call")
            rows[SQUARE] = _square(plan, tensors)
    yield from rows.values()


def places(S: int, chunk: int) -> list[int]:
    """Ends of the chunks that are timed: all of them if there are few, else those at `PLACES`."""
    n = -(-S // chunk)
    if n <= len(PLACES):
        return [min(S, chunk * (i + 1)) for i in range(n)]
    return [S if share == 1 else chunk * max(1, round(share * n)) for share in PLACES]


def over_prompt(S: int, chunk: int, stops: list[int], values: list[float]) -> list[float]:
    """A value per chunk of the prompt, from those of whole chunks at `stops`: along straight lines, also beyond them.

    The last chunk counts for as many queries as it has.
    """
    ends = np.minimum(np.arange(chunk, S + chunk, chunk), S)
    found = np.interp(ends, stops, values)
    if len(stops) > 1:
        slope = (values[1] - values[0]) / (stops[1] - stops[0])
        before = ends < stops[0]
        found[before] = np.maximum(0, values[0] + slope * (ends[before] - stops[0]))
    sizes = np.diff(ends, prepend=0) / min(chunk, S)
    return list(found * sizes)


def _chunk(prompt: Prompt, stop: int, size: int) -> Chunk:
    """A last chunk that would be short reaches back: all that are timed have as many queries."""
    return Chunk(prompt.query[:, :, max(0, stop - size) : stop], prompt.keys[:, :, :stop], prompt.values[:, :, :stop])


def _shoot(plan: Plan, chunk: Chunk, rows: dict[str, Row], shots: dict[str, list[Shot]], warm: bool) -> None:
    """Time and judge every method at one place: turn by turn, each method in turn."""
    truth = truth_of(chunk)
    runs: dict[str, Run] = {}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for name, prepare in methods(plan.patterns, plan.mass, plan.device).items():
        if not rows[name]["reason"]:
            with Failing(rows[name]):
                runs[name] = prepare(chunk)
                if warm:
                    runs[name]()
    for _ in range(plan.repeat):
        for name, run in runs.items():
            if not rows[name]["reason"]:
                with Failing(rows[name]):
                    times[name].append(seconds(run, plan.device))
    for name, run in runs.items():
        if not rows[name]["reason"]:
            with Failing(rows[name]):
                shots[name].append(_judged(name, run, chunk, truth, times[name]))


def _judged(name: str, run: Run, chunk: Chunk, truth: Truth, times: list[float]) -> Shot:
    result = run()
    density = density_of(name, chunk) if result.density is None else result.density
    return Shot(times, density, judge(result, truth))


def _summarise(row: Row, plan: Plan, prompt: Prompt, stops: list[int], shots: list[Shot]) -> None:
    S = prompt.query.shape[2]
    by_turn = zip(*(shot.seconds for shot in shots), strict=True)
    turns = [sum(over_prompt(S, plan.chunk, stops, list(turn))) for turn in by_turn]
    pairs = [_chunk(prompt, stop, plan.chunk).pairs for stop in stops]
    visible = sum(over_prompt(S, plan.chunk, stops, pairs))
    read = sum(over_prompt(S, plan.chunk, stops, [s.density * n for s, n in zip(shots, pairs, strict=True)]))
    row["density"] = read / visible
    n_bytes = [_least_bytes(_chunk(prompt, stop, plan.chunk), s.density) for stop, s in zip(stops, shots, strict=True)]
    set_times(row, turns)
    set_shares(row, plan.limits, 4 * prompt.query.shape[3] * read, sum(over_prompt(S, plan.chunk, stops, n_bytes)))
    row["chunk"], row["places"] = plan.chunk, stops
    row["samples"] = {"chunk_ms": {stop: [1e3 * x for x in s.seconds] for stop, s in zip(stops, shots, strict=True)}}
    wrong, true = np.sum([s.verdict.squared for s in shots], axis=0)
    row["rel_error"] = float(np.sqrt(wrong / true))
    masses = [s.verdict.mass for s in shots if s.verdict.mass is not None]
    row["mass"] = float(np.mean(masses)) if masses else None
    set_check(row, next((s.verdict.problem for s in shots if s.verdict.problem), None))


def _least_bytes(chunk: Chunk, density: float) -> float:
    """Queries read and outputs written, and the share of keys and values that some query must read."""
    return 2 * chunk.query.nbytes + density * (chunk.keys.nbytes + chunk.values.nbytes)


def _square(plan: Plan, prompt: Prompt) -> Row:
    """The whole prompt in one call of sdpa, as a caller does who has the memory."""
    S = prompt.query.shape[2]
    row = blank_row(S, SQUARE)
    whole = Chunk(*prompt)
    expected = plan.repeat * 4 * prompt.query.shape[3] * whole.pairs / plan.limits.flops
    if expected > MOST_SECONDS:
        row["status"], row["reason"] = "skipped", f"it would take {expected:.0f} s at the peak of this device, or more"
        return row
    chunk = _chunk(prompt, S, plan.chunk)
    outs: list[Tensor] = []

    def run() -> None:
        outs[:] = [scaled_dot_product_attention(*whole, is_causal=True, scale=whole.scale, enable_gqa=True)]

    with Failing(row):
        set_times(row, [seconds(run, plan.device) for _ in range(plan.repeat)])
        n_queries = chunk.query.shape[2]
        verdict = judge(Result(outs[0][:, :, -n_queries:], None, 1.0), truth_of(chunk))
        set_shares(row, plan.limits, 4 * prompt.query.shape[3] * whole.pairs, _least_bytes(whole, 1.0))
        row["density"], row["rel_error"] = 1.0, float(np.sqrt(np.divide(*verdict.squared)))
        set_check(row, verdict.problem)
    return row
