"""The search for patterns: every kind wins where it should, at equal cost, and the model is left as it was."""

import pytest
import torch
from tiny_models import prompt_ids, save_tiny_chat_model, tiny_model
from transformers import AttentionInterface, DynamicCache
from typer.testing import CliRunner

import retrieval_attn as ra
from retrieval_attn import cli, search_patterns
from retrieval_attn.attention.pattern_files import ABSENT, load_patterns
from retrieval_attn.hf.attention import watched_attention
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.kernels import HeadPattern, attend_dense, reference
from retrieval_attn.kernels.sparse.coverage import Layout
from retrieval_attn.kernels.sparse.patterns import fixed_index
from retrieval_attn.llm import LLM
from retrieval_attn.search_patterns import Attended, SearchedPatterns, Tried, candidates, sample_chunks, search_layer

N, D, BUDGET = 4096, 64, 1024
SCALE = D**-0.5


def a_shaped(position):
    """Any of the first 500 tokens, or of the last 350."""
    near = position - torch.randint(0, 350, (N,))
    return torch.where(torch.rand(N) < 0.5, torch.randint(0, 500, (N,)), near)


def vertical_and_slashed(position):
    """One of 20 columns, or of two distances."""
    column = torch.randint(0, N // 2, (20,))[torch.randint(0, 20, (N,))]
    return torch.where(torch.rand(N) < 0.5, column, position - torch.tensor([700, 1500])[torch.randint(0, 2, (N,))])


def in_blocks(position):
    """Any key of two blocks, which are others for every run of 64 queries."""
    block = torch.stack([torch.randint(0, n + 1, (2,)) for n in range(N // 64)])
    return 64 * block[position // 64, torch.randint(0, 2, (N,))] + torch.randint(0, 64, (N,))


def planted(*targets, G=1):
    """A layer whose head h looks almost only at targets[h] of each query."""
    position, R = torch.arange(N), len(targets) // G
    keys, values = torch.randn(1, G, N, D), torch.randn(1, G, N, D)
    wanted = [torch.minimum(target(position).clamp_min(0), position) for target in targets]
    query = torch.stack([2 * keys[0, h // R, at] + torch.randn(N, D) for h, at in enumerate(wanted)])
    return attended(query[None], keys, values)


def attended(query, keys, values):
    return Attended(query, keys, values, attend_dense(query, keys, values, SCALE, causal=True).out)


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    return search_layer(planted(a_shaped, vertical_and_slashed, in_blocks), SCALE, BUDGET, 1024)


def test_every_pattern_wins_where_it_is_planted(found):
    for kind, tried in zip(("a_shape", "vertical_slash", "block_sparse"), found, strict=True):
        error = {k: min(t.error for t in tried if t.pattern.kind == k) for k in {t.pattern.kind for t in tried}}
        others = [e for k, e in error.items() if k != kind]
        assert error[kind] < 0.3
        assert len(others) == 2
        assert all(e > 2 * error[kind] for e in others)


def test_the_winner_is_the_smallest_error(found):
    result = SearchedPatterns([found, []], 3, BUDGET, N)
    assert [pattern.kind for pattern in result.patterns[0]] == ["a_shape", "vertical_slash", "block_sparse"]
    assert result.scores[0] == [1 - min(t.error for t in tried) for tried in found]


def test_layers_without_full_attention_hold_what_is_never_read(found):
    result = SearchedPatterns([[], found], 3, BUDGET, N)
    assert result.patterns[0] == [ABSENT] * 3
    assert result.scores[0] == [0.0] * 3
    assert result.patterns[1][0].kind == "a_shape"


def test_all_candidates_cost_the_budget(found):
    """Within a block of keys, of which lists are made."""
    for tried in found:
        assert [(t.pattern.kind, t.pattern.vertical) for t in tried[:3]] == [("a_shape", n) for n in (64, 204, 512)]
        assert [t.pattern.vertical for t in tried[3:7]] == [30, 100, 500, 768]
        assert all(abs(t.keys - BUDGET) <= 64 for t in tried)
    sizes = {head[3].pattern.slash for head in found}
    assert len(sizes) > 1


def test_costs_and_errors_are_those_of_the_definition():
    """Head by head, on every chunk, with the lists that the pattern makes."""
    layer = planted(vertical_and_slashed, in_blocks, a_shaped, vertical_and_slashed, G=2)
    tried = search_layer(layer, SCALE, BUDGET, 1024)
    for head, candidate in ((0, 0), (0, 5), (1, -1), (2, 2), (3, 4)):
        pattern, keys, error = tried[head][candidate]
        listed, missed, total = 0.0, 0.0, 0.0
        for rows in (slice(2048, 3072), slice(3072, 4096)):
            query = layer.query[:, head : head + 1, rows]
            k, v = (x[:, head // 2 : head // 2 + 1, : rows.stop] for x in (layer.keys, layer.values))
            index = fixed_index(query[0], k[0], SCALE, pattern, Layout(1024, rows.stop))
            listed += float(reference.listed_keys(index, rows.stop).sum(-1).float().mean()) / 2
            out = reference.attend_sparse(query, k, v, SCALE, index).out
            exact = reference.attend_dense(query, k, v, SCALE, causal=True).out
            missed, total = missed + (out - exact).square().sum(), total + exact.square().sum()
        assert error == pytest.approx(float((missed / total).sqrt()), rel=1e-3)
        # Blocks at the start of the text may stand over.
        assert keys == pytest.approx(listed, rel=0.01)


def test_what_is_left_out_counts_only_by_its_values():
    """Whatever the pattern keeps, the mean of equal values is that value."""
    layer = planted(in_blocks)
    layer.values[:] = layer.values[:, :, :1].clone()
    tried = search_layer(attended(*layer[:3]), SCALE, BUDGET, 1024)
    assert all(t.error < 1e-5 for t in tried[0])


@pytest.mark.parametrize(
    ("n_tokens", "size", "expected"),
    [
        (2048, 2048, [(1024, 2048)]),
        (2049, 2048, [(1025, 2049)]),
        (8192, 2048, [(4096, 6144), (6144, 8192)]),
        (32768, 2048, [(16384, 18432), (21163, 23211), (25942, 27990), (30720, 32768)]),
        (6000, 1024, [(3000, 4024), (4976, 6000)]),
    ],
)
def test_chunks_are_spread_over_the_second_half(n_tokens, size, expected):
    assert [(c.start, c.stop) for c in sample_chunks(n_tokens, size)] == expected


# A whole model


@pytest.fixture(autouse=True)
def _registered():
    ra.register()


def tiny_llm(kind="llama"):
    return LLM(tiny_model(kind), None, ra.RetrievalConfig(prefill_chunk=512))


def ids(n=2048):
    return prompt_ids(n)[0].tolist()


def names():
    return set(AttentionInterface._global_mapping)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_model_reads_on_with_dense_attention(kind, monkeypatch):
    """The keys that each layer shows are those of the stock model, the last layer's included."""
    llm, seen, steps, before = tiny_llm(kind), [], [], names()

    def search(layer, scale, budget, chunk, step):
        assert (budget, chunk) == (512, 512)
        seen.append(layer)
        step(len(candidates(budget)))
        return [[Tried(HeadPattern("a_shape", 1, 2), 3.0, 0.25)]] * 4

    monkeypatch.setattr(search_patterns, "search_layer", search)
    result = search_patterns.search_patterns(llm, ids(), on_progress=steps.append)
    stock = tiny_model(kind, "sdpa")
    cache = DynamicCache(config=stock.config)
    with torch.no_grad():
        stock(torch.tensor([ids()]), **cache_argument(cache))
    full = [i for i in range(3) if kind == "llama" or i == 1]
    for i, layer in zip(full, seen, strict=True):
        assert torch.allclose(layer.keys, cache.layers[i].keys, rtol=1e-3, atol=1e-3)
    assert [len(layer) for layer in result.tried] == [4 * (i in full) for i in range(3)]
    assert result.scores[1] == [0.75] * 4
    assert (steps[0].done, steps[-1].done, steps[-1].phase) == (0, steps[-1].total, "search")
    assert names() == before
    assert llm.model.config._attn_implementation == "retrieval"


def test_a_model_from_search_to_file(tmp_path):
    llm = tiny_llm()
    result = search_patterns.search_patterns(llm, ids(), budget=512)
    assert (result.budget, result.n_tokens) == (512, 2048)
    assert all(len(head) == len(candidates(512)) for layer in result.tried for head in layer)
    # Random weights look at the whole text, and what is read is a quarter of it: nothing is exact, and nothing void.
    assert all(0 < tried.error < 1.5 for layer in result.best for tried in layer)
    result.save(tmp_path / "p.json")
    assert load_patterns(tmp_path / "p.json", 3, 4) == result.patterns


def test_the_model_is_restored_whatever_happens():
    llm, before = tiny_llm(), names()

    def fail(module, *inputs, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched_attention(llm.model, fail):
        assert llm.model.config._attn_implementation != "retrieval"
        llm.model(torch.tensor([ids(5)]), use_cache=False)
    assert llm.model.config._attn_implementation == "retrieval"
    assert names() == before


def test_bad_texts_budgets_and_models_are_refused():
    llm = tiny_llm()
    for n, budget, reason in (
        (2047, None, "the text must have at least 2048 tokens, got 2047"),
        (9000, None, "the maximum is 8192"),
        (4096, 511, "budget must be between 512 and 1024 .a quarter of the text., got 511"),
        (4096, 1025, "budget must be between 512 and 1024 .* got 1025"),
        (4096, 600.0, "budget must be between 512 and 1024 .* got 600.0"),
    ):
        with pytest.raises(ValueError, match=reason):
            search_patterns.search_patterns(llm, ids(n), budget=budget)
    with torch.no_grad():
        llm.model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the attention of layer 1 holds NaN or infinity"):
        search_patterns.search_patterns(llm, ids())


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_chat_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The lighthouse keeper counts ships. " * 70)
    return str(path)


def call(*arguments):
    return CliRunner().invoke(cli.app, ["search-patterns", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_a_file_and_says_what_is_in_it(folder, text, tmp_path):
    out = tmp_path / "p.json"
    done = call("--model", folder, "--text", text, "-o", out, "--tokens", 2048)
    assert done.exit_code == 0
    assert "2048 tokens read, 512 keys per query; the patterns are in" in done.stdout
    assert "100%" in done.stderr
    kinds = [pattern.kind for layer in load_patterns(out, 3, 4) for pattern in layer]
    rows = dict(line.replace("│", " ").split()[:2] for line in done.stdout.splitlines() if "%" in line)
    assert rows == {kind: str(kinds.count(kind)) for kind in set(kinds)} | {"all": "12"}


def test_an_interrupted_command_leaves_no_file(folder, text, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(search_patterns, "output_errors", interrupt)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["search-patterns", "--model", folder, "--text", text, "-o", str(tmp_path / "p.json")])
    assert leaving.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"-o": "/no/such/folder/p.json"}, "must lie in a folder that exists"),
        ({"-o": "p.txt"}, "must end in .json"),
        ({"--text": "/no/such/text"}, "there is no file /no/such/text"),
        ({"--text": "short.txt"}, "the text must have at least 2048 tokens, got 5"),
        ({"--budget": "9"}, "budget must be between 512 and"),
    ],
)
def test_mistakes_of_the_command_are_one_line(folder, text, tmp_path, monkeypatch, capsys, change, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    options = {"--model": folder, "--text": text, "-o": "p.json"} | change
    with pytest.raises(SystemExit) as leaving:
        cli.main(["search-patterns", *(word for option in options.items() for word in option)])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p.json").exists()
