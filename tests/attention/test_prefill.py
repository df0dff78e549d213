import logging

import pytest
import torch
from peaky import peaky

from retrieval_attn import RetrievalConfig
from retrieval_attn.attention import prefill as module
from retrieval_attn.attention.layer_memory import LayerMemory, MemoryShape
from retrieval_attn.attention.prefill import FEWEST_SPARSE, PrefillPolicy, prefill
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
    """Prefill in chunks; returns what came out, the memory and the policy."""
    query, keys, values, scale = inputs
    policy = policy or PrefillPolicy(config)
    memory = LayerMemory(config, MemoryShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, 16))
    outs = []
    for start in range(0, query.shape[2], chunk):
        part = slice(start, start + chunk)
        outs.append(prefill(query[:, :, part], keys[:, :, part], values[:, :, part], memory, scale, policy).out)
    return torch.cat(outs, dim=2), memory, policy


@pytest.mark.parametrize("tile", [100, 65536])
def test_dense_is_dense_in_any_tiles(tile):
    inputs = local_heads(700)
    out, memory, policy = run(RetrievalConfig(prefill_tile=tile), inputs, chunk=300)
    assert_exact(out, attend_dense(*inputs, causal=True).out)
    assert torch.equal(memory.store.keys(), inputs[1][0])
    assert policy.n_read == policy.n_visible == 4 * 700 * 701 / 2
    assert set(policy.kinds) == {"dense"}


def test_auto_leaves_out_what_does_not_matter_and_says_how_much():
    inputs = local_heads()
    exact = attend_dense(*inputs, causal=True).out
    out, memory, policy = run(RetrievalConfig(prefill="auto", dense_below=1), inputs)
    assert not torch.equal(out, exact)
    assert (out - exact).norm() < 0.02 * exact.norm()
    assert 0.5 < policy.n_read / policy.n_visible < 0.9
    assert policy.kinds["dense"] >= 6
    assert torch.equal(memory.store.keys(), inputs[1][0])
    assert memory.sample.length == memory.window.length == N


def test_auto_is_dense_where_it_would_not_pay(monkeypatch):
    monkeypatch.setattr(module, "DENSE_BELOW", 2500)
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


def test_a_rest_is_forgotten_with_the_tokens_that_led_to_it():
    query, keys, values, scale = peaky(G=1, R=1, T=600, S=600, D=8)
    config = RetrievalConfig(prefill="auto", dense_below=1)
    _, memory, policy = run(config, (0.01 * query, keys, values, scale), chunk=600)
    assert not policy.wants_sparse(query, memory)
    memory.crop(0)
    assert policy.wants_sparse(query, memory)


def test_sequences_of_a_batch_do_not_rest_for_each_other():
    query, keys, values, scale = peaky(G=1, R=1, T=600, S=600, D=8)
    config = RetrievalConfig(prefill="auto", dense_below=1)
    _, _, policy = run(config, (0.01 * query, keys, values, scale), chunk=600)
    other = LayerMemory(config, MemoryShape(1, 8, 8, torch.float32, 16))
    assert policy.wants_sparse(query, other)


def test_queries_of_another_dtype_than_keys_are_exact(caplog):
    query, keys, values, scale = peaky(G=1, R=1, T=600, S=600, D=8)
    inputs = query, keys.bfloat16(), values.bfloat16(), scale
    module._say_dense.cache_clear()
    out, *_ = run(RetrievalConfig(prefill="auto", dense_below=1), inputs, chunk=600)
    assert_exact(out, attend_dense(*inputs, causal=True).out)
    assert "all in one, got float32, bfloat16" in caplog.text


def test_nobody_counts_what_patterns_of_given_sizes_read():
    _, _, policy = run(RetrievalConfig(prefill="a_shape"), local_heads())
    assert policy.n_read is None
    policy.reset()
    assert policy.n_read == 0


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
    out, _, policy = run(RetrievalConfig(prefill=kind), inputs, chunk=N)
    expected = attend_patterns(*inputs, [module.DEFAULT_SIZES[kind]] * 4).out
    assert torch.equal(out, expected)
    assert policy.kinds == {kind: 4}


def test_each_head_has_the_pattern_it_was_given():
    inputs = local_heads()
    given = [HeadPattern("a_shape", 10, 100), HeadPattern("dense"), HeadPattern("dense"), HeadPattern("a_shape", 5, 9)]
    config = RetrievalConfig(prefill="a.json")
    out, *_ = run(config, inputs, PrefillPolicy(config, given), chunk=N)
    assert torch.equal(out, attend_patterns(*inputs, given).out)
