"""The small kernels of decode: the window and the merge."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.bench.kernels.measure_prompt import Plan
from retrieval_attn.bench.kernels.rows import blank_row, set_check, set_shares, set_times
from retrieval_attn.bench.kernels.timing import seconds
from retrieval_attn.bench.kernels.truth import TOLERANCE
from retrieval_attn.bench.methods import rivals
from retrieval_attn.bench.shared.exact import relative
from retrieval_attn.bench.shared.failures import Failing
from retrieval_attn.bench.shared.report import Row
from retrieval_attn.bench.vectors.prefill import Prompt
from retrieval_attn.kernels import AttentionState, attend_near, merge, reference

# The window of decode: the defaults of the runtime, 128 first and 512 last tokens.
WINDOW = 640

# Calls in a row that are timed as one, of what takes microseconds.
CALLS = 100


class Step(NamedTuple):
    """run: what is timed. error: of what it gives. rival: sdpa doing the same, if it can. flops, n_bytes: what it must
    compute and move at least. calls: so many make one time."""

    run: Callable[[], object]
    error: Callable[[], float]
    rival: Callable[[], object] | None
    flops: float
    n_bytes: float
    calls: int


def measure_steps(plan: Plan, prompt: Prompt, names: tuple[str, ...]) -> Iterator[Row]:
    """A row per kernel, on the last keys of the prompt; one that cannot be measured gives a row that says why."""
    makers = {"near": _near, "merge": _merge}
    for name in names:
        S = prompt.keys.shape[2]
        plan.advance(f"{S} tokens, {name}")
        row = blank_row(min(S, WINDOW), name, "decode")
        with torch.no_grad(), Failing(row):
            _measure(row, plan, makers[name](Prompt(*(x.to(plan.device) for x in prompt))), prompt.query.dtype)
        yield row


def _measure(row: Row, plan: Plan, step: Step, dtype: torch.dtype) -> None:
    """Turn by turn, the kernel and then its rival."""
    rival = step.rival or (lambda: None)
    step.run(), rival()
    times = []
    theirs = []
    for _ in range(plan.repeat):
        times.append(seconds(step.run, plan.device, step.calls))
        theirs.append(seconds(rival, plan.device, step.calls))
    set_times(row, times)
    set_shares(row, plan.limits, step.flops, step.n_bytes)
    row["samples"] = {"ms": [1e3 * x for x in times], "rival_ms": [1e3 * x for x in theirs] if step.rival else []}
    if step.rival:
        row["speedup_vs_sdpa"] = 1e3 * float(torch.tensor(theirs).median()) / row["total_ms"]
    row["rel_error"] = step.error()
    allowed = TOLERANCE[dtype]
    wrong = not row["rel_error"] <= allowed
    set_check(row, f"the error is {row['rel_error']:.1e}, at most {allowed:.0e} is allowed" if wrong else None)


def _near(prompt: Prompt) -> Step:
    query = prompt.query[:, :, -1:].contiguous()
    keys, values = (x[:, :, -WINDOW:].contiguous() for x in (prompt.keys, prompt.values))
    scale = query.shape[3] ** -0.5

    def error() -> float:
        true = reference.attend_near(query.float(), keys.float(), values.float(), scale)
        return _difference(attend_near(query, keys, values, scale).out, true.out)

    return Step(
        run=lambda: attend_near(query, keys, values, scale),
        error=error,
        rival=lambda: rivals.folded(query, keys, values),
        flops=4.0 * query.numel() * keys.shape[2],
        n_bytes=keys.nbytes + values.nbytes + 2 * query.nbytes,
        calls=CALLS,
    )


def _merge(prompt: Prompt) -> Step:
    """Two halves of a window into one."""
    query = prompt.query[:, :, -1:].contiguous()
    middle = min(WINDOW, prompt.keys.shape[2]) // 2
    keys, values = (x[:, :, -2 * middle :] for x in (prompt.keys, prompt.values))
    halves = [slice(0, middle), slice(middle, None)]
    scale = query.shape[3] ** -0.5
    states = [attend_near(query, keys[:, :, half], values[:, :, half], scale) for half in halves]
    wide = [AttentionState(state.out.double(), state.lse.double()) for state in states]
    return Step(
        run=lambda: merge(*states),
        error=lambda: _difference(merge(*states).out, reference.merge(*wide).out),
        rival=None,
        flops=3.0 * query.numel(),
        n_bytes=3.0 * (states[0].out.nbytes + states[0].lse.nbytes),
        calls=CALLS,
    )


def _difference(found: Tensor, wanted: Tensor) -> float:
    return relative(found.double(), wanted.double())
