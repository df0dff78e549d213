"""`load`, `generate` and `stream`: what they give and what they refuse."""

import pytest
import torch
from tiny_models import save_tiny_chat_model
from transformers import AutoModelForCausalLM, BertConfig, T5Config

import retrieval_attn as ra
from retrieval_attn.attention import prefill
from retrieval_attn.attention.pattern_files import save_patterns
from retrieval_attn.generate import chunk_ends
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.kernels import HeadPattern

CONFIG = ra.RetrievalConfig(index="exact", top_k=1 << 20, n_sink=4, n_local=16, exact_below=0, prefill_chunk=50)
TEXT = "The lighthouse keeper counts ships. " * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def llm(folder):
    return ra.load(str(folder), CONFIG, dtype="float32")


def test_three_kinds_of_prompt_are_one(llm):
    messages = [{"role": "user", "content": TEXT}]
    rendered = f"<|user|>{TEXT}<|end|><|assistant|>"
    ids = llm.tokenizer(rendered)["input_ids"]
    answers = [llm.generate(prompt, max_new_tokens=6).token_ids for prompt in (messages, rendered, ids)]
    assert answers[0] == answers[1] == answers[2]


def test_generate_equals_stock(llm, folder):
    ids = llm.encode(TEXT)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    expected = stock.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    assert llm.generate(TEXT, max_new_tokens=20).token_ids == expected


def test_stream_gives_the_same_text(llm):
    pieces = list(llm.stream(TEXT, max_new_tokens=100))
    assert len(pieces) > 5
    assert "".join(pieces) == llm.generate(TEXT, max_new_tokens=100).text


def test_sampling_is_seeded_and_warm(llm):
    texts = [llm.generate(TEXT, max_new_tokens=10, temperature=2.0, top_p=0.9, seed=s).token_ids for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stats_tell_what_happened(llm):
    seen = []
    done = llm.generate(TEXT, max_new_tokens=6, on_progress=seen.append)
    stats = done.stats
    n = len(llm.encode(TEXT))
    assert (stats.prompt_tokens, stats.reused_tokens, stats.new_tokens) == (n, 0, len(done.token_ids))
    assert 0 < stats.prefill_s <= stats.ttft_s <= stats.e2e_s
    assert len(stats.itl_s) == stats.new_tokens - 1
    assert stats.visited_fraction == 1.0
    assert stats.host_kv_bytes == 3 * 2 * 2 * 16 * 4 * (n + stats.new_tokens - 1)
    assert stats.device_kv_bytes == 3 * 2 * 2 * 16 * 4 * 20
    assert stats.stop_reason == "length"
    prefill = [p for p in seen if p.phase == "prefill"]
    assert [p.done for p in prefill] == [0, 50, 100, 150, n]
    assert [p.done for p in seen if p.phase == "build"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("n", "chunk", "prefill", "ends"),
    [
        (5000, 2048, "dense", [2048, 4096, 5000]),
        (5000, 2048, "auto", [2048, 4096, 4744, 5000]),
        (4352, 2048, "auto", [2048, 4096, 4352]),
        (100, 2048, "auto", [100]),
        (1400, 512, "auto", [512, 1024, 1144, 1400]),
        (0, 2048, "auto", []),
        (1, 1, "dense", [1]),
    ],
)
def test_a_prompts_last_tokens_are_a_chunk_of_their_own_where_prefill_may_be_sparse(n, chunk, prefill, ends):
    assert chunk_ends(n, ra.RetrievalConfig(prefill_chunk=chunk, prefill=prefill)) == ends


LONG = list(torch.randint(4, 100, (3000,), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("prefill", ["a_shape", "vertical_slash", "block_sparse", "patterns.json"])
def test_patterns_that_read_all_there_is_equal_stock(folder, tmp_path, prefill):
    """The paper's sizes cover 3,000 tokens, so every token must come out as with full attention."""
    if prefill.endswith(".json"):
        prefill = str(tmp_path / prefill)
        heads = [HeadPattern("vertical_slash", 3000, 3000), HeadPattern("block_sparse", 50), HeadPattern("dense")]
        save_patterns(prefill, [[*heads, HeadPattern("a_shape", 9, 3000)]] * 3, [[0.5] * 4] * 3)
    config = ra.RetrievalConfig(index="exact", top_k=1 << 20, prefill=prefill, prefill_chunk=1300)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    expected = stock.generate(torch.tensor([LONG]), max_new_tokens=12, do_sample=False)[0, len(LONG) :].tolist()
    done = ra.load(str(folder), config, dtype="float32").generate(LONG, max_new_tokens=12)
    assert done.token_ids == expected
    assert sum(done.stats.prefill_patterns.values()) == pytest.approx(1)
    # The last 256 tokens are exact whatever the pattern: a third of the three chunks.
    assert done.stats.prefill_patterns["dense"] >= 1 / 3


def test_auto_says_what_it_left_out(folder):
    config = ra.RetrievalConfig(prefill="auto", dense_below=1, prefill_mass=0.05, prefill_chunk=1300)
    stats = ra.load(str(folder), config, dtype="float32").generate(LONG, max_new_tokens=2).stats
    assert stats.prefill_read is not None
    assert stats.prefill_read < 1
    exact = ra.load(str(folder), dtype="float32").generate(LONG, max_new_tokens=2).stats
    assert exact.prefill_read == 1
    assert exact.prefill_patterns == {"dense": 1}


def test_a_pattern_file_for_another_model_or_none_is_refused_by_name(folder, tmp_path):
    path = tmp_path / "other.json"
    save_patterns(path, [[HeadPattern("dense")] * 4] * 5, [[0.5] * 4] * 5)
    with pytest.raises(ValueError, match="has 5 layers, the model 3: it is for another model"):
        ra.load(str(folder), ra.RetrievalConfig(prefill=str(path)))
    with pytest.raises(FileNotFoundError, match="none.json"):
        ra.load(str(folder), ra.RetrievalConfig(prefill=str(tmp_path / "none.json")))


def test_layers_have_their_own_patterns_and_a_file_that_goes_is_not_missed(folder, tmp_path):
    path = tmp_path / "own.json"
    narrow, wide = HeadPattern("a_shape", 1, 1), HeadPattern("dense")
    logits = []
    for layers in ([narrow, wide, wide], [wide, wide, narrow], [wide] * 3):
        save_patterns(path, [[pattern] * 4 for pattern in layers], [[0.5] * 4] * 3)
        llm = ra.load(str(folder), ra.RetrievalConfig(prefill=str(path)), dtype="float32")
        path.unlink()
        cache = llm.new_cache()
        given = [layer.policy.patterns[0] for layer in cache.retrieval_layers]
        assert given == layers
        with torch.no_grad():
            logits.append(llm.model(torch.tensor([LONG]), **cache_argument(cache)).logits[0, -1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_an_interrupted_sparse_chunk_loses_nothing(folder, monkeypatch):
    """Ctrl-C in the second chunk of the second layer, after its keys were stored."""
    config = ra.RetrievalConfig(index="exact", top_k=1 << 20, prefill="block_sparse", prefill_chunk=1000)
    llm = ra.load(str(folder), config, dtype="float32")
    text = "The clerk counted the boats again. " * 100
    expected = llm.session().ask(text, max_new_tokens=6).token_ids
    calls, real = [], prefill.attend_patterns

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    session = llm.session()
    monkeypatch.setattr(prefill, "attend_patterns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.ask(text, max_new_tokens=6)
    assert len({layer.get_seq_length() for layer in session.cache.layers}) == 1
    done = session.ask(text, max_new_tokens=6)
    assert done.stats.reused_tokens == 1000
    assert done.token_ids == expected


def test_the_stats_of_a_turn_are_its_own(folder):
    config = ra.RetrievalConfig(prefill="auto", dense_below=1, prefill_mass=0.05, prefill_chunk=1300)
    session = ra.load(str(folder), config, dtype="float32").session()
    session.read("The clerk counted the boats again. " * 150)
    turn = session.ask("How many?", max_new_tokens=2).stats
    assert turn.prefill_read == 1
    assert turn.prefill_patterns == {"dense": 1}


def test_stops_at_the_models_longest_context(folder):
    llm = ra.load(folder, CONFIG, dtype="float32")
    llm.model.config.max_position_embeddings = 64
    done = llm.generate(list(range(10, 60)), max_new_tokens=40)
    assert done.stats.stop_reason == "context"
    assert len(done.token_ids) == 14


class TestRefusals:
    def test_empty_prompt(self, llm):
        for empty in ("", [], [{"role": "user", "content": ""}][:0]):
            with pytest.raises(ValueError, match="prompt is empty"):
                llm.generate(empty)

    def test_too_long_prompt(self, llm):
        with pytest.raises(ValueError, match="has 9000 tokens, the maximum is 8192"):
            llm.generate([5] * 9000)

    def test_token_ids_out_of_range(self, llm):
        with pytest.raises(ValueError, match="token ids must be between 0 and 259"):
            llm.generate([1, 2, 100000])

    def test_too_little_memory(self, llm, monkeypatch):
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000})())
        with pytest.raises(MemoryError, match=r"tokens need .* GiB more of CPU memory, but 0.0 GiB are free"):
            llm.generate(TEXT)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
            ({"temperature": -1.0}, "temperature must be 0 or a positive number"),
            ({"top_p": 0.0}, "top_p must be above 0"),
            ({"top_k": -1}, "top_k must be 0"),
        ],
    )
    def test_sampling_options(self, llm, option, message):
        with pytest.raises(ValueError, match=message):
            llm.generate(TEXT, **option)

    def test_missing_path(self):
        with pytest.raises(FileNotFoundError, match="no model at '/nowhere/at/all'"):
            ra.load("/nowhere/at/all")

    def test_folder_without_a_model(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be loaded"):
            ra.load(tmp_path)

    def test_not_a_causal_lm(self, tmp_path):
        T5Config().save_pretrained(tmp_path / "t5")
        with pytest.raises(ValueError, match="'t5' is an encoder-decoder"):
            ra.load(tmp_path / "t5")

    def test_folder_with_config_but_no_weights(self, tmp_path, folder):
        (tmp_path / "bare").mkdir()
        (tmp_path / "bare" / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(ValueError, match="cannot be loaded"):
            ra.load(tmp_path / "bare")

    def test_weights_and_device(self, folder):
        with pytest.raises(ValueError, match="weights must be one of 'auto', 'bf16', 'int8', 'int4'"):
            ra.load(folder, weights="int3")
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="no CUDA device"):
                ra.load(folder, device="cuda")

    def test_dtype(self, folder):
        with pytest.raises(ValueError, match="dtype must be one of 'auto', 'float32', 'bfloat16', 'float16'"):
            ra.load(folder, dtype="float7")

    def test_missing_extra_names_the_command(self, folder, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pip install 'retrieval-attn\[quant\]'"):
            ra.load(folder, weights="int4")

    def test_vision_models_are_not_causal_lms(self, tmp_path):
        from transformers import ViTConfig

        ViTConfig().save_pretrained(tmp_path / "vit")
        with pytest.raises(ValueError, match="not a causal language model"):
            ra.load(tmp_path / "vit")


def test_bidirectional_models_are_refused(tmp_path):
    """BERT is in transformers' list of causal models, and attends both ways unless told otherwise."""
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="'bert' attends in both directions"):
        ra.load(tmp_path / "bert")
