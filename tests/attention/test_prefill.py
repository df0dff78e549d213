import logging

import pytest
import torch
from peaky import peaky

from retrieval_attn import RetrievalConfig
from retrieval_attn.attention import prefill as module
from retrieval_attn.attention import prefill_policy
from retrieval_attn.attention.layer_memory import LayerMemory, MemoryShape, Rest
from retrieval_attn.attention.prefill import prefill
from retrieval_attn.attention.prefill_policy import PrefillCounts, PrefillPolicy
from retrieval_attn.config import FEWEST_SPARSE
from retrieval_attn.kernels import HeadPattern, attend_dense, attend_patterns

N, CHUNK = 3000, 1000


def local_heads(S=N):
    """Heads that look about themselves: sparse attention has something to leave out. Then flat ones."""
    query, keys, values, scale = peaky(G=2, R=2, T=S, S=S, D=32)
    for x in (query[:, :2], keys[:, :1]):
        phase = 0.002 * torch.arange(S)
        x *= 0.01
        x[..., 0], x[..., 1] = 40 * phase.cos(), 40 * phase.sin()
    query[:, 2:] *= 0.01
    return query, keys, values, scale


def assert_exact(out, exact):
    """Scores reach 300 here, and float32 rounds them to 3e-5: weights, and outputs, are off by as much."""
    torch.testing.assert_close(out, exact, atol=1e-4, rtol=0)


def run(config, inputs, policy=None, chunk=CHUNK):
    """Prefill in chunks; returns what came out, the memory and the counts."""
    query, keys, values, scale = inputs
    policy, counts = policy or PrefillPolicy(config), PrefillCounts()
    memory = LayerMemory(config, MemoryShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, 16))
    outs = []
    for start in range(0, query.shape[2], chunk):
        part = slice(start, start + chunk)
        outs.append(prefill(query[:, :, part], keys[:, :, part], values[:, :, part], memory, scale, policy, counts).out)
    return torch.cat(outs, dim=2), memory, counts


@pytest.mark.parametrize("tile", [100, 65536])
def test_dense_is_dense_in_any_tiles(tile):
    inputs = local_heads(700)
    out, memory, counts = run(RetrievalConfig(prefill_tile=tile), inputs, chunk=300)
    assert_exact(out, attend_dense(*inputs, causal=True).out)
    assert torch.equal(memory.store.keys(), inputs[1][0])
    assert counts.n_read == counts.n_visible == 4 * 700 * 701 / 2
    assert set(counts.kinds) == {"dense"}


def test_auto_leaves_out_what_does_not_matter_and_says_how_much():
    inputs = local_heads()
    exact = attend_dense(*inputs, causal=True).out
    out, memory, counts = run(RetrievalConfig(prefill="auto", dense_below=1), inputs)
    assert not torch.equal(out, exact)
    assert (out - exact).norm() < 0.02 * exact.norm()
    assert 0.5 < counts.n_read / counts.n_visible < 0.9
    assert counts.kinds["dense"] >= 6
    assert torch.equal(memory.store.keys(), inputs[1][0])
    assert memory.sample.length == memory.window.length == N


def test_auto_is_dense_where_it_would_not_pay(monkeypatch):
    monkeypatch.setattr(prefill_policy, "DENSE_BELOW", 2500)
    inputs = local_heads()
    exact = attend_dense(*inputs, causal=True).out
    out, *_ = run(RetrievalConfig(prefill="auto"), inputs)
    assert_exact(out[:, :, :2000], exact[:, :, :2000])
    assert not torch.allclose(out[:, :, 2000:], exact[:, :, 2000:], atol=1e-3)


def test_short_turns_are_exact():
    query, keys, values, scale = peaky(G=2, R=2, T=2000, S=2000, D=32)
    config = RetrievalConfig(prefill="a.json")
    few = PrefillPolicy(config, [HeadPattern("a_shape", 1, 1)] * 4)
    exact = attend_dense(query, keys, values, scale, causal=True).out
    out, *_ = run(config, (query, keys, values, scale), few, chunk=FEWEST_SPARSE - 1)
    assert_exact(out, exact)
    out, *_ = run(config, (query, keys, values, scale), few, chunk=FEWEST_SPARSE)
    assert not torch.allclose(out, exact, atol=0.1)


def rested():
    """A memory whose one head had no use for patterns, with what it asked and its policy."""
    query, keys, values, scale = peaky(G=1, R=1, T=600, S=600, D=8)
    config = RetrievalConfig(prefill="auto", dense_below=1)
    _, memory, _ = run(config, (0.01 * query, keys, values, scale), chunk=600)
    return memory, query, PrefillPolicy(config)


def test_a_rest_is_forgotten_with_the_tokens_that_led_to_it():
    memory, query, policy = rested()
    assert not policy.decide(query, memory).sparse
    memory.crop(0)
    assert policy.decide(query, memory).sparse


def test_sequences_of_a_batch_do_not_rest_for_each_other():
    memory, query, policy = rested()
    other = LayerMemory(memory.config, MemoryShape(1, 8, 8, torch.float32, 16))
    assert policy.decide(query, other).sparse


def test_asking_changes_nothing():
    """A question that counted the rest down while it was answered was answered otherwise the second time."""
    memory, query, policy = rested()
    plans = [policy.decide(query, memory) for _ in range(3)]
    assert plans == plans[:1] * 3
    assert plans[0].rests
    assert memory.rest == (1, 2)


@pytest.mark.parametrize("saved", [0, -3])
def test_a_rest_that_was_saved_below_zero_is_over(saved):
    assert Rest(saved, 2).is_over
    assert Rest(saved, 2).after(all_dense=True) == (2, 4)
    assert not Rest(1, 2).is_over
    assert Rest(8, 8).after(all_dense=True) == (8, 8)
    assert Rest(8, 8).after(all_dense=False) == (0, 1)


def test_queries_of_another_dtype_than_keys_are_exact(caplog):
    query, keys, values, scale = peaky(G=1, R=1, T=600, S=600, D=8)
    inputs = query, keys.bfloat16(), values.bfloat16(), scale
    module._say_dense.cache_clear()
    out, *_ = run(RetrievalConfig(prefill="auto", dense_below=1), inputs, chunk=600)
    assert_exact(out, attend_dense(*inputs, causal=True).out)
    assert "all in one, got float32, bfloat16" in caplog.text


def test_nobody_counts_what_patterns_of_given_sizes_read():
    _, _, counts = run(RetrievalConfig(prefill="a_shape"), local_heads())
    assert counts.n_read is None


def test_a_layer_without_use_for_sparse_attention_is_asked_ever_less_often(monkeypatch):
    asked = []
    real = module.attend_adaptive
    monkeypatch.setattr(module, "attend_adaptive", lambda *a: asked.append(a[1].shape[2]) or real(*a))
    query, keys, values, scale = peaky(G=1, R=1, T=600 * 9, S=600 * 9, D=8)
    run(RetrievalConfig(prefill="auto", dense_below=1), (0.01 * query, keys, values, scale), chunk=600)
    assert [n // 600 for n in asked] == [1, 3, 6]


def test_heads_that_no_sparse_kernel_takes_are_dense_and_it_is_said_once(caplog):
    """Values of another dimension than keys."""
    module._say_dense.cache_clear()
    query, keys, values, scale = peaky(G=1, R=1, T=1200, S=1200, D=16, Dv=8)
    with caplog.at_level(logging.WARNING):
        out, *_ = run(RetrievalConfig(prefill="auto", dense_below=1), (query, keys, values, scale), chunk=600)
    assert_exact(out, attend_dense(query, keys, values, scale, causal=True).out)
    told = [record.getMessage() for record in caplog.records if "prefill is dense" in record.getMessage()]
    assert len(told) == 1
    assert "keys and values of one dimension, got 16 and 8" in told[0]
    with pytest.raises(ValueError, match="prefill='a_shape' cannot run on this model: .*use 'dense' or 'auto'"):
        run(RetrievalConfig(prefill="a_shape"), (query, keys, values, scale), chunk=600)


@pytest.mark.parametrize("kind", ["a_shape", "vertical_slash", "block_sparse"])
def test_a_pattern_by_name_has_the_sizes_of_the_paper(kind):
    inputs = local_heads()
    out, _, counts = run(RetrievalConfig(prefill=kind), inputs, chunk=N)
    expected = attend_patterns(*inputs, [prefill_policy.DEFAULT_SIZES[kind]] * 4).out
    assert torch.equal(out, expected)
    assert counts.kinds == {kind: 4}


def test_each_head_has_the_pattern_it_was_given():
    inputs = local_heads()
    given = [HeadPattern("a_shape", 10, 100), HeadPattern("dense"), HeadPattern("dense"), HeadPattern("a_shape", 5, 9)]
    config = RetrievalConfig(prefill="a.json")
    out, *_ = run(config, inputs, PrefillPolicy(config, given), chunk=N)
    assert torch.equal(out, attend_patterns(*inputs, given).out)
