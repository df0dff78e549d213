"""`bench fidelity`: attention outputs, head by head, beside exact attention; planted keys, and what finds them."""

import json
import shutil

import numpy as np
import pytest
import torch
from laws import some_of
from tiny_models import save_tiny_chat_model

from retrieval_attn import load
from retrieval_attn.attention.decode import StepClock, decode
from retrieval_attn.bench.fidelity.format import summary
from retrieval_attn.bench.fidelity.heads import hold_out, indexes, measure_cache, step
from retrieval_attn.bench.fidelity.measure import Fidelity
from retrieval_attn.bench.fidelity.planted import MARGIN, plant
from retrieval_attn.bench.methods.bench import Bench
from retrieval_attn.bench.methods.named import parse_method
from retrieval_attn.bench.ppl.reading import text_ids
from retrieval_attn.bench.report.read import read_report
from retrieval_attn.cli import main
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.far_index import n_covered
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.index.scan.index import ScanIndex

CONTEXT, N = 700, 12
WINDOW = ":n_sink=4:n_local=32:exact_below=0"
ALL = f"{WINDOW}:top_k=100000:estimator=topk"
FEW = f"{WINDOW}:top_k=16:estimator=topk"
STREAMING = "streaming:n_sink=4:n_local=32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bench(folder):
    return Bench(load(folder), None)


@pytest.fixture(scope="module")
def ids(bench):
    return text_ids(bench.llm, None, CONTEXT + N, seed=0)


@pytest.fixture(scope="module")
def read(bench, ids):
    return bench.read(ids[:CONTEXT])


@pytest.fixture(scope="module")
def held(bench, ids, read):
    return hold_out(bench.llm.model, read.cache, ids[CONTEXT:])


@pytest.fixture(scope="module")
def task(bench, ids, read):
    task = Fidelity(bench, ids, N, 4, seed=0)
    task.begin(read)
    return task


def method(label):
    return parse_method(label, RetrievalConfig())


def column(rows, name):
    return np.array([row[name] for row in rows], float)


@pytest.mark.parametrize("kind", ["exact", "scan", "page", "graph", "ivf", "hnsw"])
def test_all_keys_are_exact_attention(task, kind):
    rows = task.rows(method(kind + ALL))
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in range(3) for head in range(4)]
    assert (column(rows, "error") < 1e-4).all()
    assert (column(rows, "mass") > 1 - 1e-5).all()
    assert (column(rows, "recall") == 1).all()
    assert (column(rows, "planted") == 1).all()


def test_a_window_alone_reads_little_and_finds_nothing(task):
    rows, some = task.rows(method(STREAMING)), task.rows(method("scan" + FEW))
    assert (column(rows, "mass") < 0.9).all()
    assert (column(rows, "recall") == 0).all()
    assert (column(rows, "planted") == 0).all()
    assert column(rows, "error").mean() > 2 * column(some, "error").mean()
    assert (column(some, "mass") > column(rows, "mass")).all()
    assert len(set(column(some, "error"))) == len(some)


def test_held_out_is_exact_attention_of_the_tokens_that_follow(bench, ids, read, held):
    seen = []
    for layer in bench.llm.model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        twin = read.cache.fork()
        with torch.no_grad(), twin.exact():
            bench.llm.model(torch.tensor([ids[CONTEXT:]]), **cache_argument(twin))
    finally:
        for layer in bench.llm.model.model.layers:
            layer.self_attn.o_proj._forward_pre_hooks.clear()
    for one, memory, whole in zip(held, twin.memories, seen, strict=True):
        keys, values = memory.store.read(0, CONTEXT + N)
        # The model's own output sees the new tokens, too: the last of them sees all.
        scores = torch.einsum("hd,hsd->hs", one.queries[:, -1], keys.repeat_interleave(2, 0)) * memory.scale
        out = torch.einsum("hs,hsd->hd", scores.softmax(-1), values.repeat_interleave(2, 0))
        torch.testing.assert_close(out.flatten(), whole[0, -1], rtol=1e-4, atol=1e-5)
        shares = scores[:, :CONTEXT]
        torch.testing.assert_close(one.lse[:, -1], shares.logsumexp(-1), rtol=1e-5, atol=1e-5)
        out = torch.einsum("hs,hsd->hd", shares.softmax(-1), values[:, :CONTEXT].repeat_interleave(2, 0))
        torch.testing.assert_close(one.out[:, -1], out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kind"),
    some_of(["", ":share_group=false:estimator=topk", ":estimator=lift", ":mass=0.9"], ["graph", "page"]),
)
def test_a_step_is_a_step_of_decoding(read, held, kind, options):
    label = method(f"{kind}{WINDOW}:top_k=16{options}")
    ours, theirs = read.cache.fork(label.config), read.cache.fork(label.config)
    pairs = zip(ours.memories, theirs.memories, indexes(ours, label), indexes(theirs, label), held, strict=True)
    for mine, other, index, _, one in pairs:
        for query in one.queries.split(1, dim=1):
            wanted = decode(query[None], other, other.scale, StepClock())
            assert torch.equal(step(query, mine, index).out, wanted.out[0, :, 0])


@pytest.mark.parametrize("options", [":estimator=lift", ":mass=0.9", ":mass=0.9:max_k=64:min_k=4"])
def test_samples_and_budgets_are_judged_by_what_they_ask_for(task, options):
    rows = task.rows(method(f"exact{WINDOW}:top_k=16{options}"))
    assert (column(rows, "recall") == 1).all()
    assert ((column(rows, "mass") > 0) & (column(rows, "mass") <= 1)).all()


@pytest.mark.parametrize("lies", [True, False])
def test_an_index_that_finds_anything_but_the_best_shows(task, monkeypatch, lies):
    good = task.rows(method("scan" + FEW))
    search, rng = ScanIndex.search, np.random.default_rng(0)

    def lost(self, q, k=100, **options):
        if lies:
            hits = search(self, q, k, **options)
            return hits._replace(ids=rng.integers(0, self.n_keys, hits.ids.shape, np.int32))
        # The worst keys, with the scores that they have.
        hits = search(self, -q, k, **options)
        return hits._replace(scores=-hits.scores)

    monkeypatch.setattr(ScanIndex, "search", lost)
    broken = task.rows(method("scan" + FEW))
    assert column(good, "recall").min() > 0.95
    assert column(good, "planted").min() > 0.95
    assert column(broken, "recall").max() < 0.3
    assert column(broken, "planted").max() < 0.5
    assert column(broken, "error").mean() > 3 * column(good, "error").mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_key_is_the_best_of_all_by_a_margin(folder, ids, dtype):
    bench = Bench(load(folder, dtype=dtype), None)
    read = bench.read(ids[:CONTEXT])
    held = hold_out(bench.llm.model, read.cache, ids[CONTEXT:])
    twin = read.cache.fork(method("scan" + FEW).config)
    for one, memory in zip(held, twin.memories, strict=True):
        n = n_covered(memory.split.n_far)
        before = memory.store.keys().clone()
        planted = plant(one, memory, n, 4, seed=0)
        assert ((planted >= 0).sum(axis=1) > 0).all()
        assert ((planted >= 0).sum(axis=1) <= 4).all()
        keys = memory.store.keys()
        changed = (keys != before).any(-1)
        assert int(changed.sum()) == (planted >= 0).sum()
        for h, t in np.argwhere(planted >= 0):
            token = memory.split.sink_stop + planted[h, t]
            assert changed[h // 2, token]
            scores = keys[h // 2].float() @ one.queries[h, t].float()
            best, second = scores.topk(2).values.tolist()
            assert scores.argmax() == token
            assert best - second > 0.02 * best
            assert best > float(one.best[h, t] + 0.9 * MARGIN * (one.best[h, t] - one.mean[h, t]))


@pytest.mark.parametrize("size", [CONTEXT, 6000])
def test_planting_leaves_the_original_as_it_is(bench, size):
    # Shorter ones are copied by a fork, longer ones shared.
    ids = text_ids(bench.llm, None, size + N, seed=1)
    read = bench.read(ids[:size])
    task = Fidelity(bench, ids, N, 4, seed=0)
    task.begin(read)
    before = [(memory.store.keys().clone(), memory.store.values().clone()) for memory in read.cache.memories]
    again = [task.rows(method("exact" + FEW)) for _ in range(2)]
    assert again[0] == again[1]
    for memory, (keys, values) in zip(read.cache.memories, before, strict=True):
        assert torch.equal(memory.store.keys(), keys)
        assert torch.equal(memory.store.values(), values)
    later = read.cache.fork()
    assert all(torch.equal(m.store.keys(), keys) for m, (keys, _) in zip(later.memories, before, strict=True))


def test_short_contexts_have_nothing_to_find(bench, ids):
    task = Fidelity(bench, ids, N, 4, seed=0)
    task.begin(bench.read(ids[:100]))
    for label in ("scan", "streaming"):
        (row, *_) = task.rows(method(label))
        assert row["error"] < 1e-5
        assert row["mass"] > 1 - 1e-5
        assert (row["recall"], row["planted"]) == (None, None)
    (row, *_) = task.rows(method("scan:n_sink=4:n_local=32"))
    assert (row["recall"], row["mass"]) == (None, pytest.approx(1))


def test_an_index_that_cannot_be_built_is_not_an_exact_one(read, held, monkeypatch):
    def refuse(*given, **options):
        raise ValueError("not these keys")

    monkeypatch.setattr(ScanIndex, "build", refuse)
    label = method("scan" + FEW)
    with pytest.raises(RuntimeError, match="cannot be built"):
        measure_cache(read.cache.fork(label.config), label, held)


def test_the_worst_head_is_the_one_with_the_largest_error_and_the_least_of_all_else():
    rows = [
        {"context": 1024, "method": "scan", "status": "ok", "error": e, "mass": m, "recall": None, "planted": 1.0}
        for e, m in ((0.1, 0.9), (0.3, 0.5))
    ]
    (line,) = summary(rows)
    assert (line["context"], line["heads"]) == ("1k", 2)
    assert (line["mean_error"], line["worst_error"]) == (pytest.approx(0.2), 0.3)
    assert (line["mean_mass"], line["worst_mass"]) == (pytest.approx(0.7), 0.5)
    assert (line["mean_recall"], line["worst_recall"]) == (None, None)


def run(words, status=0):
    with pytest.raises(SystemExit) as left:
        main(["bench", "fidelity", *map(str, words)])
    assert left.value.code == status


def words_of(folder, *more):
    methods = f"scan{FEW},{STREAMING}"
    return ["-m", folder, "-c", "600,300", "--queries", 6, "--planted", 3, "--method", methods, "--threads", 1, *more]


def test_a_second_run_repeats_everything_to_the_byte(folder, capsys):
    outs = []
    for _ in range(2):
        run(words_of(folder, "--scores-only", "-o", "json"))
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    assert len(json.loads(outs[0])["results"]) == 2 * 2 * 12


def test_the_report_is_written_drawn_and_read_again(folder, tmp_path, capsys):
    out, picture = tmp_path / "fidelity.json", tmp_path / "fidelity.png"
    run(words_of(folder, "--out", out, "--plot", picture, "--planted", 0))
    lines = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [[word.strip() for word in line] for line in lines[2:]] == [
        ["600", f"scan{FEW}", "12"],
        ["600", STREAMING, "12"],
        ["300", f"scan{FEW}", "12"],
        ["300", STREAMING, "12"],
    ]
    report = read_report(out)
    assert (report.kind, len(report.good)) == ("fidelity", 48)
    assert {row["planted"] for row in report.good} == {None}
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_what_fails_is_a_row_of_every_head(folder, tmp_path, monkeypatch):
    def refuse(*given, **options):
        raise MemoryError("no room")

    monkeypatch.setattr("retrieval_attn.bench.fidelity.measure.find_planted", refuse)
    out = tmp_path / "fidelity.json"
    run(words_of(folder, "--out", out, "--plot", tmp_path / "fidelity.svg"), status=1)
    assert {(row["status"], row["reason"]) for row in read_report(out).rows} == {("oom", "no room")}


def test_ctrl_c_keeps_rows_and_resume_goes_on(folder, tmp_path, monkeypatch, capsys):
    out, part, rows = tmp_path / "f.json", tmp_path / "f.json.part", Fidelity.rows

    def interrupted(self, method):
        if method.name == "streaming":
            raise KeyboardInterrupt
        return rows(self, method)

    monkeypatch.setattr(Fidelity, "rows", interrupted)
    run(words_of(folder, "--out", out), status=130)
    assert "--resume goes on from there" in capsys.readouterr().err
    assert len(part.read_text().splitlines()) == 13
    # Of a method interrupted between its heads, all are done again.
    part.write_text("".join(part.read_text().splitlines(True)[:-1]))
    asked = []
    monkeypatch.setattr(Fidelity, "rows", lambda self, method: asked.append(method.name) or rows(self, method))
    run(words_of(folder, "--out", out, "--resume"))
    assert asked == ["scan", "streaming", "scan", "streaming"]
    assert len(json.loads(out.read_text())["results"]) == 48


def test_random_weights_need_no_more_than_a_config(folder, tmp_path):
    bare, out = tmp_path / "bare", tmp_path / "f.json"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    for weights in (["--dtype", "bfloat16"], []):
        run(words_of(bare, "--random", "--out", out, "-c", "300", *weights))
        assert len(read_report(out).good) == 24
    first = out.read_text()
    run(words_of(bare, "--random", "--out", out, "-c", "300", "--seed", 1))
    assert json.loads(first)["results"][0]["error"] != json.loads(out.read_text())["results"][0]["error"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "full"], "method 'full' has nothing to find; bench fidelity takes exact, ivf"),
        (["--method", "scna"], "unknown method 'scna'; did you mean scan"),
        (["--method", "scan:prefill=auto"], "all methods go on from one exact prefill; leave out weights and prefill"),
        (["--queries", 257], "--queries must be at most 256, got 257"),
        (["--planted", -1], "--planted must be at least 0, got -1"),
        (
            ["-c", "8190"],
            "a context of 8190 tokens and the 6 after it are longer than the model's longest context, 8192",
        ),
    ],
)
def test_bad_input_is_one_line(words, says, folder, capsys):
    run(words_of(folder, *words), status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert says in line


def test_a_text_needs_a_tokenizer(folder, tmp_path, capsys):
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "text").write_text("words " * 900)
    run(words_of(tmp_path, "--random", "--text", tmp_path / "text"), status=2)
    assert "a text needs a tokenizer" in capsys.readouterr().err
