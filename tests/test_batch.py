"""Several prompts in one call: each is answered as it would be alone, whatever stands beside it."""

from types import SimpleNamespace

import pytest
import torch
from laws import rarely, some_of
from tiny_models import save_tiny_chat_model
from transformers import AutoModelForCausalLM

import retrieval_attn as ra
from retrieval_attn import batch
from retrieval_attn.batch import is_batch, pad_left, refuse_padding
from retrieval_attn.far.far_index import n_covered
from retrieval_attn.hf import layer as layers
from retrieval_attn.llm import LLM

EVERYTHING = 1 << 20

LENGTHS = (1, 5, 63, 300, 700)

TEXT = "The lighthouse keeper counts ships. " * 5


def small(index="exact", **options):
    """A window so small that short prompts have far keys, and chunks in which short prompts are padding only."""
    defaults = {"top_k": EVERYTHING, "n_sink": 4, "n_local": 16, "exact_below": 0, "prefill_chunk": 50}
    return ra.RetrievalConfig(index=index, **(defaults | options))


def some_ids(length):
    return torch.randint(4, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()


PROMPTS = [some_ids(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_tiny_chat_model(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "gemma3")}


@pytest.fixture(scope="module")
def loaded(folders):
    return {kind: ra.load(folder, small(), dtype="float32") for kind, folder in folders.items()}


def with_config(llm, config):
    return LLM(llm.model, llm.tokenizer, config)


@pytest.fixture
def llm(loaded):
    """A model of its own for each test, which may be patched; the weights are shared."""
    return with_config(loaded["llama"], small())


@pytest.fixture
def caches(llm, monkeypatch):
    """Every cache that the model makes."""
    made, make = [], llm.new_cache
    monkeypatch.setattr(llm, "new_cache", lambda: made.append(make()) or made[-1])
    return made


def tokens(done):
    return [completion.token_ids for completion in done]


def alone(llm, prompts, **sampling):
    return [llm.generate(prompt, **sampling) for prompt in prompts]


@pytest.mark.parametrize(("chunk", "kind"), some_of([50, 299, 2048], ["llama", "gemma3"]))
def test_greedy_equals_stock_one_at_a_time(loaded, folders, kind, chunk):
    """Law 7. Gemma-3's sliding layers are stock: their masks and positions must leave padding out, too."""
    stock = AutoModelForCausalLM.from_pretrained(folders[kind], dtype="float32")
    expected = [
        stock.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        for ids in PROMPTS
    ]
    llm = with_config(loaded[kind], small(prefill_chunk=chunk))
    assert tokens(llm.generate(PROMPTS, max_new_tokens=12)) == expected


@pytest.mark.parametrize("index", ["graph", "scan", *rarely("exact", "ivf", "page")])
def test_each_row_draws_as_it_would_alone(loaded, index):
    """Hot enough that answers are drawn, cool enough that the prompts decide about them."""
    llm = with_config(loaded["llama"], small(index, top_k=40))
    options = {"max_new_tokens": 12, "temperature": 0.1, "top_p": 0.95, "seed": 5}
    assert tokens(llm.generate(PROMPTS, **options)) == tokens(alone(llm, PROMPTS, **options))


def test_gemma_draws_as_it_would_alone(loaded):
    llm, options = loaded["gemma3"], {"max_new_tokens": 12, "temperature": 0.1, "seed": 5}
    assert tokens(llm.generate(PROMPTS, **options)) == tokens(alone(llm, PROMPTS, **options))


def test_chunks_of_padding_and_tokens_may_be_sparse(loaded):
    """The patterns read all there is, so every prompt must come out as with full attention."""
    prompts = [some_ids(1500), some_ids(3000)]
    sparse = with_config(loaded["llama"], small(prefill="vertical_slash", prefill_chunk=1300))
    done = sparse.generate(prompts, max_new_tokens=8)
    assert tokens(done) == tokens(alone(loaded["llama"], prompts, max_new_tokens=8))
    # The last 256 tokens are exact, and 144 before them too few to be sparse: 2 chunks of 4, and 1 of 3 of the shorter.
    assert done[0].stats.prefill_patterns["vertical_slash"] == pytest.approx(3 / 7)


def test_seeds_may_differ_by_row(llm):
    done = llm.generate([TEXT, TEXT, TEXT], max_new_tokens=8, temperature=0.1, seed=[1, 2, 1])
    assert done[0].token_ids == done[2].token_ids != done[1].token_ids
    assert done[1].token_ids == llm.generate(TEXT, max_new_tokens=8, temperature=0.1, seed=2).token_ids


def test_kinds_of_prompts_may_be_mixed(llm):
    prompts = [TEXT, [{"role": "user", "content": "Who counts?"}], llm.encode("Ships."), torch.tensor([[5, 6, 7]])]
    done = llm.generate(prompts, max_new_tokens=6)
    expected = alone(llm, prompts, max_new_tokens=6)
    assert tokens(done) == tokens(expected)
    assert [completion.text for completion in done] == [completion.text for completion in expected]


def test_a_row_that_stops_early_stands_still_while_the_others_go_on(llm, caches, monkeypatch):
    stop = llm.generate(PROMPTS, max_new_tokens=12)[3].token_ids[3]
    monkeypatch.setattr(llm, "stop_ids", lambda: [stop])
    expected = alone(llm, PROMPTS, max_new_tokens=12)
    caches.clear()
    done = llm.generate(PROMPTS, max_new_tokens=12)
    assert tokens(done) == tokens(expected)
    assert [c.stats.stop_reason for c in done] == ["length", "length", "length", "stop", "length"]
    assert len(done[3].token_ids) == 4
    # The last token of an answer never runs.
    held = [len(ids) + len(c.token_ids) - 1 for ids, c in zip(PROMPTS, done, strict=True)]
    assert [[memory.length for memory in layer.memories] for layer in caches[0].retrieval_layers] == [held] * 3


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_row_holds_its_own_tokens_only(loaded, monkeypatch, kind):
    """Stores, windows and indexes of a batch are those of its prompts alone."""
    llm = with_config(loaded[kind], small())
    together, *singles = caches = [llm.new_cache() for _ in range(1 + len(PROMPTS))]
    left = iter(caches)
    monkeypatch.setattr(llm, "new_cache", lambda: next(left))
    llm.generate(PROMPTS, max_new_tokens=6)
    alone(llm, PROMPTS, max_new_tokens=6)
    for n, layer in enumerate(together.retrieval_layers):
        for memory, cache in zip(layer.memories, singles, strict=True):
            single = cache.retrieval_layers[n].memories[0]
            assert memory.split == single.split
            for ours, theirs in (
                (memory.store.keys(), single.store.keys()),
                (memory.store.values(), single.store.values()),
                (memory.window.keys(), single.window.keys()),
                (memory.sample.queries(), single.sample.queries()),
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
            if covered := n_covered(memory.split.n_far):
                assert memory.index().n_keys == covered


@pytest.mark.parametrize("n_new", [1, 2])
def test_a_batch_of_one_and_the_fewest_tokens(llm, n_new):
    done = llm.generate([TEXT], max_new_tokens=n_new)
    assert isinstance(done, list)
    assert tokens(done) == tokens([llm.generate(TEXT, max_new_tokens=n_new)])
    assert len(done[0].token_ids) == n_new
    assert len(done[0].stats.itl_s) == n_new - 1


def test_a_chunk_of_one_token_is_exact(llm):
    """Chunks end at 50, 100, 150 and 151: a single token, which as a step would retrieve."""
    done = llm.generate([some_ids(151), some_ids(101)], max_new_tokens=1)
    assert [c.stats.keys_per_head for c in done] == [0, 0]


def test_rows_reach_the_longest_context_one_by_one(folders):
    llm = ra.load(folders["llama"], small(), dtype="float32")
    llm.model.config.max_position_embeddings = 64
    done = llm.generate([some_ids(60), some_ids(20)], max_new_tokens=10)
    assert [(len(c.token_ids), c.stats.stop_reason) for c in done] == [(4, "context"), (10, "length")]


def test_stats_are_the_rows_own_and_seconds_are_shared(llm, monkeypatch):
    free = llm.generate(PROMPTS, max_new_tokens=6)
    monkeypatch.setattr(llm, "stop_ids", lambda: [free[3].token_ids[2]])
    stats = [c.stats for c in llm.generate(PROMPTS, max_new_tokens=6)]
    expected = [c.stats for c in alone(llm, PROMPTS, max_new_tokens=6)]
    for mine, own in zip(stats, expected, strict=True):
        for name in ("prompt_tokens", "reused_tokens", "new_tokens", "stop_reason", "host_kv_bytes", "index"):
            assert getattr(mine, name) == getattr(own, name), name
        assert len(mine.itl_s) == mine.new_tokens - 1
        assert 0 < mine.prefill_s <= mine.ttft_s <= mine.e2e_s
        assert mine.visited_fraction == 1
    assert len({(s.ttft_s, s.prefill_s, s.build_wait_s) for s in stats}) == 1
    assert stats[3].e2e_s < max(s.e2e_s for s in stats)
    assert [bool(s.build_s) for s in stats] == [False, False, False, True, True]


def test_progress_counts_tokens_without_padding(llm):
    seen = []
    llm.generate([some_ids(n) for n in (5, 63, 190)], max_new_tokens=2, on_progress=seen.append)
    # Chunks of 50 from the left of the longest: it alone, then 23 of the 63 beside it, then the ends of all.
    done = [(p.done, p.total) for p in seen if p.phase == "prefill"]
    assert done == [(0, 258), (50, 258), (100, 258), (173, 258), (258, 258)]
    # The others are too short for an index.
    assert [p.done for p in seen if p.phase == "build"] == list(range(4))


def test_padding_stands_on_the_left():
    ids, mask = pad_left([[7], [4, 5, 6]], torch.device("cpu"))
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    assert ids[mask].tolist() == [7, 4, 5, 6]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", False),
        ([1, 2], False),
        ([{"role": "user", "content": "?"}], False),
        ([], False),
        (torch.tensor([[1, 2]]), False),
        (list(torch.tensor([1, 2])), False),
        (["text"], True),
        (("a", "b"), True),
        ([[1, 2]], True),
        ([[{"role": "user", "content": "?"}]], True),
        ([torch.tensor([1, 2])], True),
        ([[]], True),
    ],
)
def test_what_is_a_batch(prompt, expected):
    assert is_batch(prompt) is expected


class TestInterruptions:
    """Ctrl-C in any phase: no build goes on, and the model answers the next batch as if nothing had been."""

    @pytest.mark.parametrize(
        ("module", "name", "call"),
        [(layers, "prefill", 20), (batch, "follow_builds", 1), (layers, "decode", 8), (batch, "stop_reason", 7)],
        ids=["prefill", "build", "step", "draw"],
    )
    def test_the_next_batch_is_right(self, llm, caches, monkeypatch, module, name, call):
        expected = tokens(alone(llm, PROMPTS, max_new_tokens=6))
        caches.clear()
        real, calls = getattr(module, name), []

        def interrupt(*args):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(module, name, interrupt)
            llm.generate(PROMPTS, max_new_tokens=6)
        builds = [memory.far_index.building for memory in caches[0].memories]
        assert all(build is None or build.done() for build in builds)
        assert tokens(llm.generate(PROMPTS, max_new_tokens=6)) == expected


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([TEXT, ""], "prompt 1 is empty"),
            ([[5], [5], []], "prompt 2 is empty"),
            ([[5] * 9000, [5]], "prompt 0 has 9000 tokens, the maximum is 8192"),
            ([[1, 2], [1, 100000]], "token ids must be between 0 and 259, got 1 to 100000 in prompt 1"),
            ([TEXT, 3], "prompt 1 must be a text, chat messages or token ids, got int"),
            ([TEXT, ["nested"]], "prompt 1 must be a text, chat messages or token ids, got list of str"),
        ],
    )
    def test_the_prompt_is_named(self, llm, prompts, message):
        with pytest.raises(ValueError, match=message):
            llm.generate(prompts)

    def test_a_list_of_prompts_where_one_is_asked_for(self, llm):
        with pytest.raises(ValueError, match="the prompt must be a text, chat messages or token ids, got list of str"):
            llm.stream(["one", "two"])

    def test_seeds_of_another_number(self, llm):
        with pytest.raises(ValueError, match="seed must be one number, or one for each of the 3 prompts, got 2"):
            llm.generate([TEXT] * 3, seed=[1, 2])

    def test_sampling_options(self, llm):
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
            llm.generate([TEXT], max_new_tokens=0)

    def test_memory_for_all_rows_together_before_any_work(self, llm, caches, monkeypatch):
        # The prompt, and the one token of its answer.
        one = llm.plan(len(llm.encode(TEXT)) + 1)
        free = int(1.5 * (one.host + one.passing))
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
        llm.generate([TEXT], max_new_tokens=1)
        caches.clear()
        with pytest.raises(MemoryError, match=f"{2 * one.n_tokens} tokens need .* GiB more of CPU memory"):
            llm.generate([TEXT, TEXT], max_new_tokens=1)
        assert caches == []

    def test_recurrent_layers_take_no_padding(self):
        """Some versions of transformers mask their padding in the first chunk of a prompt only."""
        cache = SimpleNamespace(layers=[SimpleNamespace(), SimpleNamespace(update_recurrent_state=None)])
        refuse_padding(cache, [[1, 2], [3, 4]])
        with pytest.raises(ValueError, match="layer 1 of this .* recurrent state.* of one length, got 1 to 2 tokens"):
            refuse_padding(cache, [[1, 2], [3]])
