"""Sparse causal attention of a chunk of a prompt: each head by a given pattern, or by the cheapest that suffices."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from retrieval_attn.kernels.dense import attend_dense
from retrieval_attn.kernels.merge import AttentionState
from retrieval_attn.kernels.sparse.attend import attend_sparse
from retrieval_attn.kernels.sparse.choose import HeadChoice, Workspace, choose
from retrieval_attn.kernels.sparse.coverage import Layout, stack_heads
from retrieval_attn.kernels.sparse.lists import SparseIndex, check_causal
from retrieval_attn.kernels.sparse.near_best import Chooser, is_quick
from retrieval_attn.kernels.sparse.patterns import KINDS, HeadPattern, check_patterns, fixed_index
from retrieval_attn.kernels.sparse.probes import MOST_PROBES, n_probes

# What is chosen from: the three patterns, and on a CPU that is quick at it, keys chosen for every run.
SPARSE_KINDS = (*KINDS[:3], "near_best")

# Some heads, and what they read.
Listed = tuple[list[int], SparseIndex]

# Bytes of the probes' attention that a GPU holds at once.
PROBED_BYTES = 1 << 30


def attend_patterns(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, patterns: Sequence[HeadPattern]
) -> AttentionState:
    """Causal attention of each query head by a pattern of given sizes; "dense" is one of them.

    query: (B, H, T, D), the last T of S positions; keys, values: (B, G, S, D); devices, dtypes, result and errors as of
    `attend_sparse`. patterns: one for each of the H heads, or ValueError.
    """
    check_causal(query, keys, values)
    (B, H, T, _), (G, S) = query.shape, keys.shape[1:3]
    check_patterns(patterns, H)
    R, layout = H // G, Layout(T, S)
    # Heads of one list share their key heads, so where patterns differ a call serves one key head.
    step = groups_at_once(query, keys) if len(set(patterns)) == 1 else 1
    rows = []
    for b in range(B):
        lists: list[Listed] = []
        for g in range(0, G if T else 0, step):
            group = range(g * R, min(G, g + step) * R)
            for pattern in dict.fromkeys(patterns[h] for h in group if patterns[h].kind != "dense"):
                heads = [h for h in group if patterns[h] == pattern]
                lists.append((heads, fixed_index(query[b, heads], keys[b, g : g + step], scale, pattern, layout)))
        rows.append(lists)
    return _attend_rows(query, keys, values, scale, rows)


def attend_adaptive(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mass: float, kinds: Sequence[str] | None = None
) -> tuple[AttentionState, list[HeadChoice]]:
    """Causal attention of each query head by the cheapest pattern that keeps enough of the attention.

    Shapes, devices, dtypes and errors as of `attend_patterns`. mass: above 0 and below 1; the mass left out is at most
    1 - mass, as a root mean square over a sample of the queries. kinds: the patterns to choose from, None for those
    that pay on this machine ("near_best" runs on CPUs only); a head for which none is worth its while is dense. Returns
    the state and the B * H choices.
    """
    check_causal(query, keys, values)
    on_cpu = query.device.type == "cpu"
    if kinds is None:
        kinds = SPARSE_KINDS if on_cpu and is_quick() else KINDS[:3]
    if not 0 < mass < 1:
        raise ValueError(f"mass must be above 0 and below 1 (a share of the attention mass), got {mass!r}")
    allowed = SPARSE_KINDS if on_cpu else KINDS[:3]
    if not kinds or not set(kinds) <= set(allowed):
        raise ValueError(f"kinds must be some of {', '.join(allowed)}, got {', '.join(map(str, kinds)) or 'none'}")
    (B, H, T, _), (G, S) = query.shape, keys.shape[1:3]
    R, layout = H // G, Layout(T, S)
    n_groups = groups_at_once(query, keys)
    # A CPU looks at one head of the group at a time, in memory that it has at hand.
    n_heads = 1 if on_cpu and n_groups == 1 else n_groups * R
    scratch = query.new_empty(n_heads * n_probes(T) * S, dtype=torch.float32) if on_cpu else None
    choices: list[HeadChoice] = []
    rows = []
    for b in range(B):
        lists: list[Listed] = []
        for g in range(0, G if T else 0, n_groups):
            wide = keys[b, g : g + n_groups].float()
            workspace = Workspace(scratch, functools.cache(lambda wide=wide: [Chooser(head, layout) for head in wide]))
            last = min(G, g + n_groups) * R
            for h in range(g * R, last, n_heads):
                some = slice(h, min(last, h + n_heads))
                chosen, found = choose(query[b, some], wide, scale, mass, layout, kinds, workspace)
                choices += chosen
                lists += [([h + i for i in heads], index) for heads, index in found]
        rows.append(lists)
    return _attend_rows(query, keys, values, scale, rows), choices


def groups_at_once(query: Tensor, keys: Tensor) -> int:
    """How many KV heads' queries are probed in one call: on a CPU one; on a GPU, whose launches are dear, what fits."""
    if query.device.type == "cpu":
        return 1
    R = query.shape[1] // keys.shape[1]
    return max(1, PROBED_BYTES // (4 * MOST_PROBES * R * max(keys.shape[2], 1)))


def _attend_rows(query: Tensor, keys: Tensor, values: Tensor, scale: float, rows: list[list[Listed]]) -> AttentionState:
    """Row by row of the batch, each with the lists of its heads; heads without a list are dense."""
    states = [
        _attend_row(query[b : b + 1], keys[b : b + 1], values[b : b + 1], scale, lists) for b, lists in enumerate(rows)
    ]
    return states[0] if len(states) == 1 else AttentionState.beside(states, 0)


def _attend_row(query: Tensor, keys: Tensor, values: Tensor, scale: float, lists: list[Listed]) -> AttentionState:
    if not lists:
        return attend_dense(query, keys, values, scale, causal=True)
    H, G = query.shape[1], keys.shape[1]
    state = attend_sparse(query, keys, values, scale, stack_heads(lists, H))
    listed = {h for heads, _ in lists for h in heads}
    for g in range(G):
        # Key head by key head, whose keys are then not copied for each of its query heads.
        if dense := [h for h in range(g * H // G, (g + 1) * H // G) if h not in listed]:
            exact = attend_dense(query[:, dense], keys[:, g : g + 1], values[:, g : g + 1], scale, causal=True)
            state.out[:, dense], state.lse[:, dense] = exact
    return state
