"""Methods of the quality benchmarks: what they go on from is shared, what they answer is their own."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from laws import rarely
from option_values import VALUES
from tiny_models import save_tiny_chat_model, tiny_model
from transformers import DynamicCache

import retrieval_attn as ra
from retrieval_attn.bench.methods.bench import Bench
from retrieval_attn.bench.methods.faiss_rivals import FrozenIndex
from retrieval_attn.bench.methods.named import parse_method
from retrieval_attn.bench.methods.names import METHODS
from retrieval_attn.bench.methods.streaming import StreamingLayer
from retrieval_attn.bench.methods.talk import bytes_of
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.index import build_index
from retrieval_attn.terminal.option_language import parse_pairs, split_pairs, words_of

EVERYTHING = 1 << 20
ALL_KEYS = ra.RetrievalConfig(
    top_k=EVERYTHING, estimator="topk", n_sink=4, n_local=16, followup="retrieve", exact_below=0
)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def bench(request, tmp_path_factory):
    folder = save_tiny_chat_model(tmp_path_factory.mktemp(request.param), request.param)
    return Bench(ra.load(folder, dtype="float32"), lambda weights: pytest.fail("no other weights were asked for"))


def text_ids(bench, n, seed=0):
    return np.random.default_rng(seed).integers(2, 100, n).tolist()


@pytest.mark.parametrize("label", ["folded", "exact", "ivf", "graph", "scan", "page", "hnsw", "exact:followup=exact"])
@pytest.mark.parametrize("shared", [True, *rarely(False)])
def test_with_all_keys_every_method_says_what_full_attention_says(bench, label, shared):
    ids = text_ids(bench, 400)
    read = bench.read(ids) if shared else None
    asked = [*ids, *text_ids(bench, 9, seed=1)]
    full = bench.start(parse_method("full", ALL_KEYS), ids, read).answer(asked, 12)
    other = bench.start(parse_method(label, ALL_KEYS), ids, read).answer(asked, 12)
    assert other.token_ids == full.token_ids
    assert len(full.token_ids) > 1


def test_few_keys_say_something_else(bench):
    """Or the test above could not fail."""
    ids = text_ids(bench, 400)
    read, asked = bench.read(ids), [*ids, *text_ids(bench, 9, seed=1)]
    few = ra.RetrievalConfig(top_k=1, estimator="topk", n_sink=0, n_local=1, followup="retrieve", exact_below=0)
    full = bench.start(parse_method("full", few), ids, read).answer(asked, 12)
    other = bench.start(parse_method("exact", few), ids, read).answer(asked, 12)
    assert other.token_ids != full.token_ids


@pytest.mark.parametrize("label", ["full", "streaming", "graph", *rarely("scan", "hnsw")])
def test_forks_and_turns_do_not_see_each_other(bench, label):
    """Many questions of one context, a history with another answer than was given: as if nothing had been before."""
    config = ra.RetrievalConfig(top_k=8, n_sink=4, n_local=16, followup="retrieve", exact_below=0)
    method, ids = parse_method(label, config), text_ids(bench, 400)
    read = bench.read(ids)
    first, second = ([*ids, *text_ids(bench, 9, seed=seed)] for seed in (1, 2))
    alone = [bench.start(method, ids, read).answer(asked, 6).token_ids for asked in (first, second)]
    talk = bench.start(method, ids, read)
    assert [talk.fork().answer(asked, 6).token_ids for asked in (first, second, first)] == [*alone, alone[0]]
    # The history holds another answer than was given.
    history = [*first, *text_ids(bench, 5, seed=3)]
    assert talk.answer(first, 6).token_ids == alone[0]
    again = talk.answer(history, 6).token_ids
    cold = bench.start(method, ids, read)
    cold.answer(first, 1)
    assert again == cold.answer(history, 6).token_ids


def test_reading_on_gives_the_same_as_reading_at_once(bench):
    """Longer than the window, so that a question that retrieved would give other keys."""
    ids = text_ids(bench, 1500)
    part = bench.read(ids[:1200])
    whole, on = bench.read(ids), bench.read(ids, after=part)
    for a, b in zip(whole.cache.memories, on.cache.memories, strict=True):
        assert (a.store.keys() - b.store.keys()).norm() < 1e-5 * a.store.keys().norm()
    assert part.cache.get_seq_length() == 1200


def test_streaming_is_full_attention_under_a_mask():
    """Two passes of several tokens, then single ones: sinks and window before the pass, and the pass itself."""
    model = tiny_model("llama", "sdpa")
    n_sink, n_local = 3, 8
    cache = DynamicCache(config=model.config)
    cache.layers = [StreamingLayer(n_sink, n_local) for _ in cache.layers]
    torch.manual_seed(1)
    ids, starts = torch.randint(2, 100, (1, 60)), [0, 30, 47, *range(50, 60)]
    with torch.no_grad():
        for start, stop in zip(starts, [*starts[1:], 60], strict=True):
            positions = torch.arange(start, stop)[None]
            last = model(input_ids=ids[:, start:stop], position_ids=positions, **cache_argument(cache), use_cache=True)
    assert cache.get_seq_length() == 60
    assert all(layer.keys.shape[2] == n_sink + n_local for layer in cache.layers)
    # The same by a mask over a whole pass: token i of a pass that began at s sees what was kept at s, and s to i.
    allowed = torch.zeros(60, 60, dtype=torch.bool)
    for start, stop in zip(starts, [*starts[1:], 60], strict=True):
        for i in range(start, stop):
            allowed[i, start : i + 1] = True
            allowed[i, [*range(min(n_sink, start)), *range(max(0, start - n_local), start)]] = True
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=allowed[None, None])
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)


def test_hnsw_finds_old_keys_and_new_ones():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 700, 16)).astype(np.float32)
    index = FrozenIndex.build(keys[:, :600])
    view = index.snapshot()
    index.append(keys[:, 600:], keys=keys)
    q = rng.standard_normal((4, 16)).astype(np.float32)
    q[0], q[1] = 9 * keys[0, 650], 9 * keys[0, 20]
    hit, best = index.search(q, 20, effort=600), build_index("exact", keys).search(q, 20)
    assert hit.ids[0, 0] == 650
    np.testing.assert_array_equal(hit.ids[:2, 0], best.ids[:2, 0])
    assert np.mean([len(set(a) & set(b)) for a, b in zip(hit.ids, best.ids, strict=True)]) > 19
    np.testing.assert_allclose(hit.scores[:2, 0], best.scores[:2, 0], rtol=1e-4)
    assert view.search(q, 20).ids.max() < 600
    several = index.search(np.stack([q, q], axis=1), 20, effort=600)
    np.testing.assert_array_equal(several.ids[:, 1], hit.ids)
    with pytest.raises(ValueError, match="HNSW cannot forget"):
        index.truncate(599)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grph", "unknown method 'grph'; did you mean graph?"),
        ("zzz", "unknown method 'zzz'; there are full, folded"),
        ("graph:topk=3", "unknown option 'topk'; did you mean top_k?"),
        ("full:top_k=3", "unknown option 'top_k'; there are weights"),
        ("graph:top_k", "method 'graph' in 'graph:top_k': top_k needs a value, as in top_k=100"),
        ("graph:top_k=3:top_k=4", "top_k is given twice, as 3 and as 4"),
        ("graph:n_local=lots", "n_local must be tokens such as 8k, 1m or 5000, got 'lots'"),
        ("graph:top_k=0", "top_k must be an integer of at least 1, got 0"),
        ("quantized:bits=x", "bits must be one of '2', '4', '8', got 'x'"),
        ("full:weights=int3", "weights must be one of 'auto', 'int8', 'int4', got 'int3'"),
    ],
)
def test_methods_that_are_none_are_named(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_method(text, ALL_KEYS)


def test_options_reach_the_config():
    method = parse_method("graph:top_k=7:estimator=lift:mass=none:share_group=false", ALL_KEYS)
    assert (method.config.index, method.config.top_k, method.config.estimator) == ("graph", 7, "lift")
    assert method.config.mass is None
    assert method.config.share_group is False
    assert parse_method("scan:weights=int4", ALL_KEYS).shares_prefill is False
    assert parse_method("scan:kv_dtype=int8", ALL_KEYS).shares_prefill is False
    assert parse_method("scan:prefill=auto:prefill_chunk=2048", ALL_KEYS).shares_prefill is False
    assert all(parse_method(name, ALL_KEYS).name == name for name in METHODS)


@pytest.mark.parametrize("name", [name for name in VALUES if name != "index"])
def test_methods_and_set_are_one_language(name):
    text, value = VALUES[name]
    said = parse_pairs(split_pairs([f"{name}={text}"]), words_of(RetrievalConfig), "--set")
    assert parse_method(f"scan:{name}={text}", RetrievalConfig()).config == RetrievalConfig(index="scan", **said)
    assert said == {name: value}


@pytest.mark.parametrize("label", ["offloaded", "full:weights=int4"])
def test_what_the_machine_lacks_is_said(bench, label, monkeypatch):
    monkeypatch.setattr(bench, "_load", lambda weights: ra.load(weights=weights))
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((ImportError, RuntimeError), match=r"GPU|pip install"):
        bench.start(parse_method(label, ALL_KEYS), [1, 2, 3], None)


def test_int8_keys_are_read_by_the_method_itself(bench):
    ids = text_ids(bench, 400)
    talk = bench.start(parse_method("scan:kv_dtype=int8", ALL_KEYS), ids, bench.read(ids))
    half = talk.answer([*ids, 5], 3).host_kv_bytes
    whole = bench.start(parse_method("scan", ALL_KEYS), ids, bench.read(ids)).answer([*ids, 5], 3).host_kv_bytes
    assert whole == 4 * half  # float32


def test_bytes_of_what_is_quantised_are_those_it_takes():
    """A quantised tensor says of itself what it would take if it were not; what it is made of does not."""

    class Quantised(torch.Tensor):
        def __tensor_flatten__(self):
            return ["data_part", "scale_part"], None

    held = torch.zeros(4, 64).as_subclass(Quantised)
    held.data_part, held.scale_part = torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4)
    layer = SimpleNamespace(keys=torch.zeros(2, 2), values=None, _quantized_keys=held, _quantized_values=(held, {}))
    assert bytes_of(layer, "cpu") == 16 + 2 * (64 + 16)
    assert bytes_of(layer, "cuda") == 0
