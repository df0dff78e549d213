"""The transformers seams: stock models, unpatched, give stock tokens when everything is retrieved."""

import pytest
import torch
from laws import some_of
from tiny_models import COMMON, MODELS, prompt_ids, tiny_config, tiny_model
from transformers import (
    DynamicCache,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    Phi3ForCausalLM,
)

import retrieval_attn as ra
from retrieval_attn.hf.versions import KEEPS_RECURRENT_STATE, cache_argument
from retrieval_attn.index import build_index
from retrieval_attn.kv.window import Split, split

EVERYTHING = 1 << 20


@pytest.fixture(autouse=True)
def _registered():
    ra.register()


def small(index: str = "exact", **options) -> ra.RetrievalConfig:
    """A config whose window is small enough that a short prompt has far keys, all of which are retrieved."""
    defaults = {"top_k": EVERYTHING, "n_sink": 4, "n_local": 16, "exact_below": 0, "prefill_tile": 100}
    return ra.RetrievalConfig(index=index, **(defaults | options))


def greedy(model, ids, cache=None, n=12, **options):
    out = model.generate(ids, **cache_argument(cache), max_new_tokens=n, do_sample=False, **options)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("kind", "index"), some_of(MODELS, ["exact", "ivf", "graph"]))
def test_generate_equals_stock(kind, index):
    ids = prompt_ids(300)
    stock = greedy(tiny_model(kind, "sdpa"), ids)
    model = tiny_model(kind)
    assert greedy(model, ids, ra.RetrievalCache(model.config, small(index))) == stock


@pytest.mark.parametrize("kind", MODELS)
def test_a_wrong_far_key_changes_the_output(kind, monkeypatch):
    """The test above can fail: without the far keys the logits differ visibly."""
    ids = prompt_ids(300)
    model = tiny_model(kind)
    logits = []
    for top_k in (EVERYTHING, 1):
        cache = ra.RetrievalCache(model.config, small(top_k=top_k, estimator="topk"))
        with torch.no_grad():
            model(ids[:, :-1], **cache_argument(cache))
            logits.append(model(ids[:, -1:], **cache_argument(cache)).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def step_error(kind, index="graph"):
    """Relative L2 distance of 20 decode steps' logits to those of one stock forward pass over the same tokens."""
    ids, model = prompt_ids(300), tiny_model(kind)
    cache = ra.RetrievalCache(model.config, small(index))
    with torch.no_grad():
        stock = tiny_model(kind, "sdpa")(ids).logits[0, 280:]
        model(ids[:, :280], **cache_argument(cache))
        ours = [model(ids[:, i : i + 1], **cache_argument(cache)).logits[0, 0] for i in range(280, 300)]
    return float((torch.stack(ours) - stock).norm() / stock.norm())


@pytest.mark.parametrize(("kind", "index"), some_of(MODELS, ["exact", "ivf", "graph"]))
def test_logits_of_decode_steps_equal_stock(kind, index):
    """Law 1. Greedy tokens alone would not notice one token lost in 300; measured here: 4e-6 intact, broken >= 2e-3."""
    assert step_error(kind, index) < 1e-4


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shift", [-1, 1])
def test_one_token_in_neither_or_in_both_is_noticed(kind, shift, monkeypatch):
    """Law 3, broken on purpose: the boundary between far and near moved by one token."""

    def shifted(length, n_sink, n_local):
        sink_stop, far_stop, length = split(length, n_sink, n_local)
        return Split(sink_stop, min(length, max(sink_stop, far_stop + shift)), length)

    monkeypatch.setattr("retrieval_attn.attention.layer_memory.split", shifted)
    assert step_error(kind) > 1e-3


@pytest.mark.parametrize("length", [1, 63, 640, 641, 5000])
def test_any_prompt_length(length):
    """Law 3 at the paper's window sizes: 640 tokens are all near, the 641st pushes one out."""
    ids = prompt_ids(length)
    stock = greedy(tiny_model("llama", "sdpa"), ids, n=4)
    model = tiny_model("llama")
    cache = ra.RetrievalCache(model.config, ra.RetrievalConfig(top_k=EVERYTHING, index="exact"))
    assert greedy(model, ids, cache, n=4) == stock
    memory = cache.memories[0]
    assert memory.length == length + 3
    assert memory.split.n_far == max(0, length + 3 - 640)
    assert memory.window.keys().shape[2] + memory.split.n_far == memory.length


@pytest.mark.parametrize("chunk", [1, 7, 64, 299, 1000])
def test_prefill_in_chunks_equals_one_piece(chunk):
    """Law 4."""
    ids = prompt_ids(300)
    model = tiny_model("llama")
    states = []
    for size in (chunk, 300):
        cache = ra.RetrievalCache(model.config, small())
        with torch.no_grad(), cache.exact():
            for start in range(0, 300, size):
                model(ids[:, start : start + size], **cache_argument(cache))
        states.append(cache)
    for one, other in zip(states[0].memories, states[1].memories, strict=True):
        torch.testing.assert_close(one.store.keys(), other.store.keys(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.store.values(), other.store.values(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.sample.queries(), other.sample.queries(), rtol=1e-4, atol=1e-4)


def test_prefill_chunk_size_of_generate():
    ids = prompt_ids(300)
    stock = greedy(tiny_model("llama", "sdpa"), ids)
    model = tiny_model("llama")
    assert greedy(model, ids, ra.RetrievalCache(model.config, small()), prefill_chunk_size=64) == stock


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_left_padded_batch_equals_stock(kind):
    """Law 7: padding changes neither what is near nor what is found."""
    ids = prompt_ids(300, batch=3)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 17, 250)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    stock = greedy(tiny_model(kind, "sdpa"), ids, attention_mask=mask)
    model = tiny_model(kind)
    cache = ra.RetrievalCache(model.config, small())
    assert greedy(model, ids, cache, attention_mask=mask) == stock
    assert [memory.length for memory in cache.retrieval_layers[0].memories] == [311, 294, 61]


def test_position_gaps_do_not_change_membership():
    """Law 7: windows and ids count tokens, not position ids."""
    ids, model = prompt_ids(200), tiny_model("llama")
    positions = torch.arange(200)[None] + (torch.arange(200)[None] > 100) * 700
    caches = [ra.RetrievalCache(model.config, small()), DynamicCache(config=model.config)]
    logits = []
    for cache, attention in zip(caches, ("retrieval", "sdpa"), strict=True):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            model(ids[:, :-1], position_ids=positions[:, :-1], **cache_argument(cache))
            logits.append(model(ids[:, -1:], position_ids=positions[:, -1:], **cache_argument(cache)).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert caches[0].memories[0].split == (4, 184, 200)


def test_follow_up_turn_runs_only_new_tokens():
    """Law 6."""
    first, second = prompt_ids(300), prompt_ids(40, seed=1)
    model = tiny_model("llama")
    cache = ra.RetrievalCache(model.config, small())
    answer = model.generate(first, **cache_argument(cache), max_new_tokens=8, do_sample=False)
    ids = torch.cat([answer, second], dim=1)
    lengths = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ours = greedy(model, ids, cache)
    handle.remove()
    assert lengths[0] == 41
    assert ours == greedy(tiny_model("llama", "sdpa"), ids)


def test_beam_search_equals_stock():
    ids = prompt_ids(120)
    stock = greedy(tiny_model("llama", "sdpa"), ids, num_beams=3, n=8)
    model = tiny_model("llama")
    assert greedy(model, ids, ra.RetrievalCache(model.config, small()), num_beams=3, n=8) == stock


def test_prompt_lookup_decoding_equals_stock():
    """Assisted generation rolls back rejected tokens: crop takes them out of window, store and index."""
    ids = prompt_ids(40).repeat(1, 5)
    stock = greedy(tiny_model("llama", "sdpa"), ids, eos_token_id=127)
    model = tiny_model("llama")
    cache = ra.RetrievalCache(model.config, small())
    assert greedy(model, ids, cache, eos_token_id=127, prompt_lookup_num_tokens=4) == stock


@pytest.mark.parametrize("index", ["exact", "ivf", "graph"])
@pytest.mark.parametrize("tokens", [-30, 270])
def test_crop_and_go_on_equals_a_run_that_never_went_there(index, tokens):
    ids, other = prompt_ids(300), prompt_ids(50, seed=5)
    model = tiny_model("llama")
    config = small(index)
    cache = ra.RetrievalCache(model.config, config)
    model.generate(ids, **cache_argument(cache), max_new_tokens=1, do_sample=False)
    cache.start_builds()
    cache.crop(tokens)
    assert cache.get_seq_length() == 270
    changed = torch.cat([ids[:, :270], other], dim=1)
    assert greedy(model, changed, cache) == greedy(tiny_model("llama", "sdpa"), changed)


def test_crop_keeps_all_layers_alike_when_one_refuses():
    model = tiny_model("gemma3")
    cache = ra.RetrievalCache(model.config, small())
    with torch.no_grad():
        model(prompt_ids(200), **cache_argument(cache))
    with pytest.raises(ValueError, match="cannot go back to 190 tokens"):
        cache.crop(-10)
    assert {layer.get_seq_length() for layer in cache.layers} == {200}


def test_interrupted_forward_pass_is_settled(monkeypatch):
    model = tiny_model("llama")
    cache = ra.RetrievalCache(model.config, small())
    ids = prompt_ids(200)
    with torch.no_grad():
        model(ids[:, :150], **cache_argument(cache))
    attend, calls = type(cache.layers[1]).attend, []

    def interrupt(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attend(self, *args)

    monkeypatch.setattr(type(cache.layers[1]), "attend", interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids[:, 150:], **cache_argument(cache))
    monkeypatch.undo()
    assert {layer.get_seq_length() for layer in cache.layers} == {150, 200}
    cache.settle()
    assert greedy(model, ids, cache) == greedy(tiny_model("llama", "sdpa"), ids)


class TestRefusals:
    def test_foreign_cache(self):
        model = tiny_model("llama")
        with pytest.raises(ValueError, match="needs the cache retrieval_attn.RetrievalCache"):
            model.generate(prompt_ids(10), max_new_tokens=2)

    def test_foreign_cache_of_a_hybrid(self):
        model = tiny_model("gemma3")
        with pytest.raises(ValueError, match="layer 1 needs the cache"):
            model(prompt_ids(10), **cache_argument(DynamicCache(config=model.config)))

    def test_models_that_cannot_be_served(self):
        from transformers import (
            BloomConfig,
            DeepseekV3Config,
            DiffLlamaConfig,
            FalconConfig,
            Gemma2Config,
            GemmaConfig,
            MambaConfig,
            OpenAIGPTConfig,
            T5Config,
        )

        for config, reason in (
            (T5Config(), "'t5' is an encoder-decoder"),
            (MambaConfig(), "'mamba' has no attention layers"),
            (DeepseekV3Config(), "MLA"),
            (Gemma2Config(), "softcaps"),
            (GemmaConfig(use_bidirectional_attention=True), "attends in both directions"),
            (BloomConfig(), "'bloom' adds a bias for distance"),
            (FalconConfig(alibi=True), "'falcon' adds a bias for distance"),
            (OpenAIGPTConfig(), "'openai-gpt' does not call transformers' attention interface"),
            (DiffLlamaConfig(), "'diffllama' attends twice"),
            (MistralConfig(), r"'mistral' has no layer of full attention alone"),
        ):
            with pytest.raises(ValueError, match=reason):
                ra.RetrievalCache(config)

    def test_more_tokens_than_a_wide_window_holds(self):
        config = Phi3Config(**COMMON | {"max_position_embeddings": 100}, sliding_window=120)
        torch.manual_seed(7)
        model = Phi3ForCausalLM(config).eval()
        model.set_attn_implementation("retrieval")
        cache = ra.RetrievalCache(config, small())
        with torch.no_grad():
            model(prompt_ids(120), **cache_argument(cache))
            with pytest.raises(ValueError, match="attends to the last 120 tokens only"):
                model(prompt_ids(1), **cache_argument(cache))

    def test_a_window_that_texts_fill_leaves_nothing_to_retrieve(self):
        with pytest.raises(ValueError, match="has no layer of full attention alone"):
            ra.RetrievalCache(Phi3Config(**COMMON, sliding_window=COMMON["max_position_embeddings"] - 1), small())

    def test_nan_in_queries_is_named(self):
        model = tiny_model("llama")
        cache = ra.RetrievalCache(model.config, small(top_k=10))
        with torch.no_grad():
            model(prompt_ids(200), **cache_argument(cache))
            model.model.layers[0].self_attn.q_proj.weight.fill_(torch.nan)
            with pytest.raises(ValueError, match=r"NaN"):
                model(prompt_ids(1), **cache_argument(cache))

    def test_four_dimensional_mask(self):
        model = tiny_model("llama")
        cache = ra.RetrievalCache(model.config, small())
        with pytest.raises(ValueError, match="padding masks"):
            model(prompt_ids(4), attention_mask=torch.zeros(1, 1, 4, 4), **cache_argument(cache))


def test_kv_stays_16_bit_and_unchanged():
    """Law 5: what was offloaded is gathered back bit for bit."""
    config = LlamaConfig(**(tiny_config("llama").to_dict() | {"num_hidden_layers": 1}))
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    stock = DynamicCache(config=config)
    cache = ra.RetrievalCache(config, small())
    ids = prompt_ids(200)
    with torch.no_grad():
        model(ids, **cache_argument(stock))
        model.set_attn_implementation("retrieval")
        model(ids, **cache_argument(cache))
    memory = cache.memories[0]
    assert memory.store.keys().dtype == torch.bfloat16
    assert torch.equal(memory.store.keys(), stock.layers[0].keys[0])
    assert torch.equal(memory.store.values(), stock.layers[0].values[0])


class TestInterruptions:
    """Wherever Ctrl-C or an error strikes, `settle` brings store, window, sample, index and layers back in step."""

    def run_interrupted(self, monkeypatch, where, error=KeyboardInterrupt):
        """Prefill, decode twice, and be interrupted at `where` in the third step; returns the model, cache and ids."""
        model, ids = tiny_model("llama"), prompt_ids(300)
        cache = ra.RetrievalCache(model.config, small("graph"))
        with torch.no_grad():
            model(ids[:, :298], **cache_argument(cache))
            model(ids[:, 298:299], **cache_argument(cache))
            with monkeypatch.context() as patched, pytest.raises(error):
                patched.setattr(where, _raising(error))
                model(ids[:, 299:], **cache_argument(cache))
        return model, cache, ids

    @pytest.mark.parametrize(
        "where",
        [
            "retrieval_attn.far.estimators.attend_far",
            "retrieval_attn.attention.decode.attend_near",
            "retrieval_attn.kv.host_store.HostStore.append",
            "retrieval_attn.kv.window.Window.append",
        ],
    )
    def test_in_a_decode_step(self, monkeypatch, where):
        model, cache, ids = self.run_interrupted(monkeypatch, where)
        cache.settle()
        assert {layer.get_seq_length() for layer in cache.layers} == {299}
        for memory in cache.memories:
            assert memory.length == memory.window.length == memory.sample.length == 299
        assert greedy(model, ids, cache) == greedy(tiny_model("llama", "sdpa"), ids)

    def test_in_a_crop_that_waits_for_a_build(self, monkeypatch):
        model, ids = tiny_model("llama"), prompt_ids(300)
        cache = ra.RetrievalCache(model.config, small())
        with torch.no_grad():
            model(ids, **cache_argument(cache))
        cache.start_builds()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("retrieval_attn.far.far_index.FarIndex._take_build", _raising(KeyboardInterrupt))
            cache.crop(-100)
        cache.settle()
        cache.crop(200 - cache.get_seq_length())
        assert [memory.length for memory in cache.memories] == [200] * 3
        assert greedy(model, ids[:, :200], _minus_one(cache)) == greedy(tiny_model("llama", "sdpa"), ids[:, :200])

    def test_a_hybrid_that_cannot_go_back_is_spoiled_not_wrong(self, monkeypatch):
        model, ids = tiny_model("gemma3"), prompt_ids(200)
        cache = ra.RetrievalCache(model.config, small())
        with torch.no_grad():
            model(ids[:, :150], **cache_argument(cache))
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr("retrieval_attn.hf.layer.prefill", _raising(KeyboardInterrupt))
                model(ids[:, 150:], **cache_argument(cache))
            cache.settle()
            assert cache.spoiled
            with pytest.raises(ValueError, match="start a new cache"):
                model(ids[:, 150:], **cache_argument(cache))


def _raising(error):
    def raising(*args, **kwargs):
        raise error

    return raising


def _minus_one(cache):
    """generate() wants at least one token to run."""
    cache.crop(-1)
    return cache


def test_cache_with_a_model_of_another_attention_is_refused():
    """Its new tokens would be attended to alone, and the rest of the context silently ignored."""
    model = tiny_model("llama", "sdpa")
    with pytest.raises(ValueError, match="must be loaded with attn_implementation='retrieval'"):
        model.generate(prompt_ids(100), **cache_argument(ra.RetrievalCache(model.config, small())), max_new_tokens=3)


@pytest.mark.parametrize("kind", ["conv", "linear_attention"])
def test_recurrent_layers_that_this_transformers_does_not_keep_are_refused(monkeypatch, kind):
    """On 4.57 they were taken for attention, and the first forward pass ended in an AttributeError."""
    monkeypatch.setattr("retrieval_attn.hf.served.KEEPS_RECURRENT_STATE", False)
    config = Lfm2Config(**(COMMON | {"num_hidden_layers": 2, "layer_types": ["full_attention", "full_attention"]}))
    ra.RetrievalCache(config, small())
    config.layer_types = [kind, "full_attention"]
    with pytest.raises(ValueError, match="'lfm2' has layers with a recurrent state.*upgrade transformers"):
        ra.RetrievalCache(config, small())


@pytest.mark.skipif(not KEEPS_RECURRENT_STATE, reason="caches of this transformers version keep no recurrent state")
def test_a_model_with_recurrent_layers_is_served_but_cannot_go_back():
    config = Lfm2Config(**(COMMON | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}))
    torch.manual_seed(0)
    model, ids = Lfm2ForCausalLM(config).eval(), prompt_ids(300)
    model.set_attn_implementation("sdpa")
    stock = greedy(model, ids)
    model.set_attn_implementation("retrieval")
    cache = ra.RetrievalCache(config, small())
    assert greedy(model, ids, cache) == stock
    cache.settle()
    assert not cache.spoiled
    with pytest.raises(ValueError, match=r"layer 0 \(LinearAttentionLayer\) cannot go back to"):
        cache.crop(-5)


def failing_builds(monkeypatch, kind="graph"):
    """Indexes of a kind cannot be built any more."""
    build = build_index

    def build_or_fail(wanted, *args, **kwargs):
        if wanted == kind:
            raise MemoryError("no room")
        return build(wanted, *args, **kwargs)

    monkeypatch.setattr("retrieval_attn.far.index_build.build_index", build_or_fail)


@pytest.mark.parametrize("background", [True, False])
def test_a_build_that_fails_is_reported_and_keys_are_searched_exactly(monkeypatch, caplog, background):
    """Of 250 far keys eight are read: those of the exact index, to the token."""
    model, ids = tiny_model("llama"), prompt_ids(270)
    expected = greedy(model, ids, ra.RetrievalCache(model.config, small("exact", top_k=8)))
    with monkeypatch.context() as patched:
        failing_builds(patched)
        cache = ra.RetrievalCache(model.config, small("graph", top_k=8))
        with torch.no_grad():
            model(ids[:, :-1], **cache_argument(cache))
        if background:
            for build in cache.start_builds():
                assert isinstance(build.exception(), MemoryError)
        assert greedy(model, ids, cache) == expected
    assert "the graph index cannot be built (no room); all keys are searched exactly" in caplog.text
    assert {memory.far_index.if_built.kind for memory in cache.memories} == {"exact"}
    # The next request tries again.
    for build in cache.start_builds():
        build.result()
    assert {memory.index().kind for memory in cache.memories} == {"graph"}


def test_an_append_that_fails_is_reported_and_keys_are_searched_exactly(monkeypatch, caplog):
    model, ids = tiny_model("llama"), prompt_ids(270)
    config = small("scan", top_k=8)
    expected = greedy(model, ids, ra.RetrievalCache(model.config, config), n=150)
    monkeypatch.setattr("retrieval_attn.index.ScanIndex.append", _raising(MemoryError("no room")))
    cache = ra.RetrievalCache(model.config, config)
    answer = greedy(model, ids, cache, n=150)
    # As far as no key became far that the index would have taken.
    assert answer[:64] == expected[:64]
    assert "the scan index cannot take new keys (no room)" in caplog.text
    assert {memory.far_index.if_built.kind for memory in cache.memories} == {"exact"}


def test_an_outgrown_index_is_built_anew():
    """Chat first, then a long text: the scan that served the short context must not serve the long one."""
    model = tiny_model("llama")
    cache = ra.RetrievalCache(model.config, small("graph", exact_below=200))
    kinds = []
    with torch.no_grad():
        for length in (200, 400):
            model(prompt_ids(length), **cache_argument(cache))
            cache.start_builds()
            kinds.append({memory.index().kind for memory in cache.memories})
    assert kinds == [{"exact"}, {"graph"}]
