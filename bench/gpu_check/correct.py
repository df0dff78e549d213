"""Every kernel against its definition in float64, on fresh random data whose attention is peaked.

The rule: the error is at most twice that of the same mathematics with every step rounded to the kernel's dtype.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_attn.bench.shared.failures import Failing
from retrieval_attn.bench.shared.report import Row
from retrieval_attn.kernels import AttentionState, SparseIndex, attend_near, attend_sparse, merge, reference
from retrieval_attn.kernels.sparse.coverage import Coverage, Layout, list_coverage
from retrieval_attn.kernels.sparse.lists import DTYPES, HEAD_DIMS

# Query heads, KV heads; keys, of which the last so many are the queries of prefill.
H, G, S, T = 8, 2, 700, 300

WINDOW = 640

# What another order of summation may change, relative to what is summed: a few units in the last place of a float32.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


class Inputs(NamedTuple):
    """query (1, H, T, D); keys, values (1, G, S, D)."""

    query: Tensor
    keys: Tensor
    values: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.to(dtype) for x in self))


class KernelCase(NamedTuple):
    """check() gives the error and what is allowed."""

    name: str
    check: Callable[[], tuple[float, float]]


def cases(device: str, seed: int, head_dims: tuple[int, ...] = HEAD_DIMS) -> list[KernelCase]:
    """Every kernel in each head dimension and dtype. On a CPU, what runs there in place of the kernel."""
    found = []
    for D in head_dims:
        for dtype in DTYPES:
            what = f"D={D} {str(dtype).removeprefix('torch.')}"
            make = functools.partial(peaky, D=D, dtype=dtype, device=device, seed=seed + D)
            found += [
                KernelCase(f"sparse {what}", functools.partial(check_sparse, make)),
                KernelCase(f"near {what}", functools.partial(check_near, make, masked=False)),
                KernelCase(f"near, masked {what}", functools.partial(check_near, make, masked=True)),
                KernelCase(f"merge {what}", functools.partial(check_merge, make)),
            ]
    return found


def check_all(chosen: list[KernelCase], left: Callable[[], float]) -> Iterator[Row]:
    """A row per case: whether it holds, and by how much; "skipped" once no seconds are left."""
    for case in chosen:
        row: Row = {"part": "correctness", "method": case.name, "status": "failed", "reason": None}
        row |= {"error": None, "allowed": None}
        if left() <= 0:
            row |= {"status": "skipped", "reason": "no time was left"}
        else:
            with torch.no_grad(), Failing(row):
                row["error"], row["allowed"] = case.check()
                right = row["error"] <= row["allowed"]
                row["status"] = "ok" if right else "failed"
                row["reason"] = None if right else f"error {row['error']:.1e}, allowed {row['allowed']:.1e}"
        yield row


def peaky(n_queries: int, n_keys: int, *, D: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Inputs whose softmax is nearly one-hot: every query holds a multiple of one key, plus noise."""
    make = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn((1, G, n_keys, D), generator=make) for _ in range(2))
    needle = torch.randint(n_keys, (1, H, n_queries, 1), generator=make).expand(-1, -1, -1, D)
    chosen = keys.repeat_interleave(H // G, dim=1).gather(2, needle)
    query = 2 * chosen + torch.randn(chosen.shape, generator=make)
    return Inputs(*(x.to(device, dtype) for x in (query, keys, values)))


def check_sparse(make: Callable[[int, int], Inputs]) -> tuple[float, float]:
    """Every second diagonal of blocks and a few columns, a query offset, and a last run that is not full."""
    inputs = make(T, S)
    scale, layout = inputs.query.shape[3] ** -0.5, Layout(T, S)
    index = _every_second(layout, inputs.query.device)
    state = attend_sparse(*inputs, scale, index)
    true = reference.attend_sparse(*inputs.to(torch.float64), scale, index)
    position = torch.arange(S - T, S, device=inputs.query.device)
    causal = torch.arange(S, device=position.device) <= position[:, None]
    listed = reference.listed_keys(index, S).repeat_interleave(index.rows, dim=2)[:, :, :T]
    return _compare(state, true, _in_own_dtype(inputs, scale, listed & causal))


def check_near(make: Callable[[int, int], Inputs], masked: bool) -> tuple[float, float]:
    inputs = make(1, WINDOW)
    scale, mask = inputs.query.shape[3] ** -0.5, None
    if masked:
        mask = torch.rand((1, H, 1, WINDOW), generator=torch.Generator().manual_seed(0)).to(inputs.query.device) > 0.3
    state = attend_near(*inputs, scale, mask)
    true = reference.attend_near(*inputs.to(torch.float64), scale, mask)
    return _compare(state, true, _in_own_dtype(inputs, scale, mask))


def check_merge(make: Callable[[int, int], Inputs]) -> tuple[float, float]:
    """Two halves of a window, of which one hardly counts in some rows."""
    inputs = make(5, WINDOW)
    scale, half = inputs.query.shape[3] ** -0.5, WINDOW // 2
    parts = [Inputs(inputs.query, *(x[:, :, i : i + half] for x in inputs[1:])) for i in (0, half)]
    states = [AttentionState(*_in_own_dtype(part, scale, None)) for part in parts]
    states = [AttentionState(state.out, state.lse.float()) for state in states]
    true = reference.merge(*(AttentionState(state.out.double(), state.lse.double()) for state in states))
    a, b = states
    dtype = a.out.dtype
    share = torch.sigmoid(b.lse - a.lse).to(dtype)[..., None]
    plain = (1 - share) * a.out + share * b.out, torch.logaddexp(a.lse.to(dtype), b.lse.to(dtype))
    return _compare(merge(*states), true, plain)


def _every_second(layout: Layout, device: torch.device) -> SparseIndex:
    """Heads that read every second block before their own, and single keys in between."""
    diagonals = (torch.arange(layout.n_blocks, device=device) % 2 == 0).expand(H, -1)
    columns = torch.arange(3, layout.S, 37, device=device).expand(H, -1)
    return list_coverage(Coverage(diagonals, columns), layout)


def _in_own_dtype(inputs: Inputs, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same mathematics with every step rounded to the dtype of the inputs."""
    keys, values = (x.repeat_interleave(H // G, dim=1) for x in inputs[1:])
    scores = inputs.query @ keys.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ values, scores.logsumexp(-1)


def _compare(state: AttentionState, true: AttentionState, plain: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The worse of out and lse, in units of what is allowed for it."""
    alive = true.lse > -torch.inf
    if not torch.equal(state.lse > -torch.inf, alive) or bool(state.out[~alive].any()):
        raise ValueError("a row without keys must be empty, and no other")
    size = 1 + float(true.lse[alive].abs().max())
    sizes = size * (1 + float(true.out[alive].abs().max())), size
    pairs = []
    for ours, own, exact, largest in zip(state, plain, true, sizes, strict=True):
        allowed = 2 * _largest(own[alive], exact[alive]) + _ROUNDING * largest
        pairs.append((_largest(ours[alive], exact[alive]), allowed))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _largest(found: Tensor, true: Tensor) -> float:
    """NaN is infinitely far."""
    return float((found.double() - true).abs().nan_to_num(torch.inf).max())


def describe(row: Row) -> str:
    """One line of the log."""
    numbers = "" if row["error"] is None else f" error {row['error']:.1e}, allowed {row['allowed']:.1e}"
    said = {"ok": "ok", "skipped": "skipped"}.get(row["status"], "FAILED")
    return f"{said:8}{row['method']}{numbers or ': ' + str(row['reason'])}"
