"""`bench ppl`: what full attention says of a text, and every method beside it."""

import json
import math

import pytest
import torch
from tiny_models import save_tiny_chat_model

from retrieval_attn import load
from retrieval_attn.bench.methods.bench import Bench
from retrieval_attn.bench.methods.named import parse_method
from retrieval_attn.bench.ppl.measure import scanned_note
from retrieval_attn.bench.ppl.reading import Foretelling, divergence, judge, left_to_do, read_and_measure, text_ids
from retrieval_attn.bench.report.read import read_report
from retrieval_attn.cli import main
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.index.scan.index import ScanIndex

WINDOW = ":n_sink=4:n_local=32:exact_below=0"
ALL = f"{WINDOW}:top_k=100000:estimator=topk"
FEW = f"{WINDOW}:top_k=8:estimator=topk"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bench(folder):
    return Bench(load(folder), None)


def measured(bench, labels, contexts=(600,), stretch=24, done=(), limit=None):
    methods = [parse_method(label, RetrievalConfig()) for label in labels]
    ids = text_ids(bench.llm, None, max(contexts) + stretch + 1, seed=0)
    task = Foretelling(bench, ids, stretch, parse_method("full", RetrievalConfig()))
    left = left_to_do(contexts, methods, limit, done)
    return list(read_and_measure(bench, ids, left, task, lambda what, share: None))


def test_all_keys_foretell_what_full_attention_does(bench):
    full, *others = measured(bench, ["full", *(kind + ALL for kind in ("exact", "scan", "page", "graph"))])
    assert (full["agreement"], full["kl"]) == (1, 0)
    for row in others:
        assert row["status"] == "ok"
        assert row["ppl"] == pytest.approx(full["ppl"], rel=1e-4)
        assert row["agreement"] == 1
        assert row["kl"] < 1e-6


def test_perplexity_is_that_of_one_forward_pass(bench):
    (row,) = measured(bench, ["full"])
    ids = torch.tensor([text_ids(bench.llm, None, 625, seed=0)])
    bench.llm.model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            logits = bench.llm.model(ids).logits[0, 600:-1]
    finally:
        bench.llm.model.set_attn_implementation("retrieval")
    loss = torch.nn.functional.cross_entropy(logits.double(), ids[0, 601:])
    assert row["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert row["tokens"] == 24


def test_full_attention_is_the_measure_even_if_nobody_asked_for_it(bench):
    (alone,) = measured(bench, ["scan" + FEW])
    _, beside = measured(bench, ["full", "scan" + FEW])
    scores = ("ppl", "agreement", "kl")
    assert [alone[name] for name in scores] == [beside[name] for name in scores]


def test_a_window_and_a_broken_index_show(bench, monkeypatch):
    good, window = measured(bench, ["scan" + WINDOW + ":top_k=64", "streaming:n_sink=4:n_local=32"])
    search = ScanIndex.search

    def lost(self, q, k=100, **options):
        hits = search(self, q, k, **options)
        return hits._replace(ids=(hits.ids * 7919 % self.n_keys).astype("int32"))

    monkeypatch.setattr(ScanIndex, "search", lost)
    (broken,) = measured(bench, ["scan" + WINDOW + ":top_k=64:estimator=topk"])
    assert good["kl"] < 0.1 * window["kl"]
    assert good["kl"] < 0.1 * broken["kl"]
    assert window["visited_pct"] is None
    assert broken["agreement"] < good["agreement"]


def test_contexts_grow_and_are_read_once(bench, monkeypatch):
    read, new = type(bench).read, []

    def counted(self, ids, on_progress=None, after=None):
        new.append(len(ids) - (len(after.ids) if after else 0))
        return read(self, ids, on_progress, after)

    monkeypatch.setattr(type(bench), "read", counted)
    rows = measured(bench, ["full", "scan" + ALL], contexts=(900, 300, 600))
    assert new == [300, 300, 300]
    assert [row["context"] for row in rows] == [300, 300, 600, 600, 900, 900]
    assert [row["last"] for row in rows] == [True] * 6


def test_what_is_done_is_not_done_again(bench):
    done = [{"context": 300, "method": "full"}, {"context": 600, "method": "scan" + ALL}]
    rows = measured(bench, ["full", "scan" + ALL], contexts=(300, 600), done=done)
    assert [(row["context"], row["method"]) for row in rows] == [(300, "scan" + ALL), (600, "full")]
    assert len(measured(bench, ["full", "scan" + ALL], contexts=(300, 600), limit=3)) == 3


def test_a_method_that_fails_is_a_row(bench, monkeypatch):
    monkeypatch.setattr("retrieval_attn.bench.methods.bench.start_ours", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(bench, ["scan"])

    def refuse(*given):
        raise MemoryError("no room\nat all")

    monkeypatch.setattr("retrieval_attn.bench.methods.bench.start_ours", refuse)
    full, scan = measured(bench, ["full", "scan"])
    assert full["status"] == "ok"
    assert (scan["status"], scan["reason"], scan["ppl"]) == ("oom", "no room", None)


def test_without_full_attention_methods_are_measured_but_not_compared(bench, monkeypatch):
    def refuse(*given):
        raise MemoryError("no room")

    monkeypatch.setattr("retrieval_attn.bench.methods.bench.start_stock", refuse)
    full, scan = measured(bench, ["full", "scan" + ALL])
    assert full["status"] == "oom"
    assert scan["ppl"] > 1
    assert (scan["status"], scan["agreement"], scan["kl"]) == ("ok", None, None)
    assert "no room" in scan["reason"]


def test_judging_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    full = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]))
    judged = judge(logits, [0, 1], full)
    assert judged.ppl == pytest.approx((0.5 * 0.8) ** -0.5)
    assert judged.agreement == 0.5
    assert judged.kl == pytest.approx(0.5 * 0.7 * math.log(8))
    assert judge(logits, [0, 1], None)[1:] == (None, None)


def test_impossible_tokens_add_nothing_and_nan_is_an_error():
    impossible = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert judge(impossible, [0], impossible) == (pytest.approx(2), 1, 0)
    assert divergence(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, -torch.inf]])).item() == 0
    with pytest.raises(ValueError, match="not finite"):
        judge(torch.tensor([[torch.nan, 0.0]]), [0], None)
    with pytest.raises(ValueError, match="not finite"):
        judge(impossible, [2], None)


def test_a_tokenizer_without_words_is_an_error(bench, monkeypatch):
    monkeypatch.setattr(bench.llm, "tokenizer", lambda text, **options: {"input_ids": []})
    with pytest.raises(ValueError, match="makes only 0 tokens"):
        text_ids(bench.llm, None, 100, seed=0)


def run(words, status=0):
    with pytest.raises(SystemExit) as left:
        main(["bench", "ppl", *map(str, words)])
    assert left.value.code == status


def words_of(folder, *more):
    return ["-m", folder, "-c", "400,200", "--stretch", 8, "--method", f"full,scan{FEW}", "--threads", 1, *more]


def test_a_second_run_repeats_scores_to_the_byte(folder, capsys):
    outs = []
    for form in ("md", "md", "json", "json"):
        run(words_of(folder, "--scores-only", "-o", form))
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    assert outs[2] == outs[3]
    assert "ms/token" not in outs[0]
    assert set(json.loads(outs[2])["results"][0]) == {
        "context",
        "method",
        "tokens",
        "ppl",
        "agreement",
        "kl",
        "status",
        "reason",
    }


def test_the_report_is_written_drawn_and_read_again(folder, tmp_path, capsys):
    out, picture = tmp_path / "ppl.json", tmp_path / "ppl.png"
    run(words_of(folder, "--out", out, "--plot", picture, "-o", "csv"))
    assert [line.split(",")[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["400", "full"],
        ["400", f"scan{FEW}"],
        ["200", "full"],
        ["200", f"scan{FEW}"],
    ]
    report = read_report(out)
    assert (report.kind, len(report.good)) == ("ppl", 4)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "ppl.json.part").exists()


def test_ctrl_c_keeps_rows_and_resume_goes_on(folder, tmp_path, monkeypatch, capsys):
    out, rows = tmp_path / "ppl.json", Foretelling.rows

    def interrupted(self, method):
        if method.name == "scan":
            raise KeyboardInterrupt
        return rows(self, method)

    monkeypatch.setattr(Foretelling, "rows", interrupted)
    run(words_of(folder, "--out", out), status=130)
    assert "--resume goes on from there" in capsys.readouterr().err
    assert len((tmp_path / "ppl.json.part").read_text().splitlines()) == 2
    asked = []
    monkeypatch.setattr(Foretelling, "rows", lambda self, method: asked.append(method.name) or rows(self, method))
    run(words_of(folder, "--out", out, "--resume"))
    assert asked == ["scan", "full", "scan"]
    assert len(json.loads(out.read_text())["results"]) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "grpah"], "unknown method 'grpah'; did you mean graph"),
        (["--method", "scan:topk=3"], "unknown option 'topk'; did you mean top_k"),
        (["--stretch", 0], "--stretch must be at least 1, got 0"),
        (
            ["-c", "9000"],
            "a context of 9000 tokens and the 9 after it are longer than the model's longest context, 8192",
        ),
        (["--text", "TEXT"], "a context of 400 tokens and the 9 after it are longer than the text, 44 tokens"),
        (["--text", "/missing"], "no file /missing"),
        (["--resume"], "--resume goes on with what lies beside --out"),
    ],
)
def test_bad_input_is_one_line(words, says, folder, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("Four and forty characters, not one of more..")
    run(words_of(folder, *(text if word == "TEXT" else word for word in words)), status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert says in line


def test_the_note_says_below_which_length_this_run_scanned():
    assert "exact_below (512)" in scanned_note(RetrievalConfig(exact_below=512))
