"""The recall benchmark: what it accepts, what it writes, and that its figures mean what they say."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from retrieval_attn import cli
from retrieval_attn.bench.methods.faiss_rivals import build_rival
from retrieval_attn.bench.recall import format as recall_format
from retrieval_attn.bench.recall import measure_layer as recall_measure
from retrieval_attn.bench.recall.curves import at_error, at_recall, growth
from retrieval_attn.bench.recall.estimators import ESTIMATORS
from retrieval_attn.bench.recall.format import ROW_FIELDS, blank_row
from retrieval_attn.bench.recall.measure import run
from retrieval_attn.bench.recall.options import Asked, make_options
from retrieval_attn.bench.recall.truth import Truth, check_hits
from retrieval_attn.bench.vectors.sources import capture, vectors
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.index import INDEX_KINDS, SearchResult, build_index
from retrieval_attn.kernels import TailSummary

# What a second run may change.
TIMES = {name for name in ROW_FIELDS if name.endswith(("_us", "_s"))}


def options(**changes):
    asked = Asked(context="1500", seed="3", index="exact", compare="none", queries=4, shape="4,2,32", dtype="float32")
    return make_options(replace(asked, **changes), RetrievalConfig(top_k=20))


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    """Sweeping the caches takes long and is not what is tested."""
    monkeypatch.setattr(recall_measure, "cache_bytes", lambda: 1 << 16)


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall_measure, "cache_bytes", lambda: 1 << 16)
        yield run(options(source="shaped,duplicates", index="all", compare="all", effort=["graph=20,80"]))


@pytest.fixture(scope="module")
def layer():
    found = vectors("shaped", S=1500, seed=0, H=4, G=2, D=32, n_prefill=100, n_heldout=6)
    return found, Truth.of(found, 20)


def rows_of(report, **wanted):
    return [row for row in report["results"] if all(row[name] == value for name, value in wanted.items())]


def test_lists():
    made = options(source="shaped, zeros,shaped", context="1k,2k", seed="1,2", effort=["exact=1,2"], compare="all")
    assert made.sources == ("shaped", "zeros")
    assert made.contexts == (1024, 2048)
    assert made.seeds == (1, 2)
    assert made.methods == ("folded", "hnsw", "faiss-ivf", "exact")
    assert made.efforts == {"exact": (1, 2)}
    assert options(index="all").methods == INDEX_KINDS
    assert "adversarial" not in options(source="all").sources


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "fake"}, "source must be one of real:<layer>, shaped"),
        ({"source": ""}, "--source must be of real"),
        ({"context": "0"}, "--context must be at least 1"),
        ({"seed": "a"}, "--seed must list integers"),
        ({"index": "none"}, "name no method"),
        ({"index": "tree"}, "--index must be of exact"),
        ({"compare": "annoy"}, "--compare must be of folded, hnsw, faiss-ivf"),
        ({"estimator": "guess"}, "--estimator must be of topk, lift, tail"),
        ({"effort": ["graph=3"]}, "--effort must be METHOD=N,N"),
        ({"effort": ["exact=x"]}, "--effort must list integers"),
        ({"queries": 0}, "--queries must be at least 1"),
        ({"shape": "embedded"}, "take --source real"),
        ({"dtype": "int8"}, "--dtype must be one of"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        options(**change)
    assert "\n" not in str(caught.value)


def test_files_are_checked_before_the_run(tmp_path):
    for arguments, message in (
        (["--out", str(tmp_path / "report.txt")], "--out must end in"),
        (["--out", str(tmp_path / "missing" / "report.json")], "--out must lie in a folder"),
        (["--plot", str(tmp_path / "missing")], "--plot must be a folder"),
        (["--capture", str(tmp_path / "missing" / "real")], "--capture must lie in a folder"),
        (["--capture", __file__], "is not a capture"),
        (["--text", str(tmp_path / "missing")], "--text must be a file"),
        (["-o", "xml"], "--output must be one of"),
    ):
        done = CliRunner().invoke(cli.app, ["bench", "recall", "-c", "300", "--shape", "2,1,16", *arguments])
        assert message in str(done.exception)


def test_every_method_has_its_rows(report):
    assert all(set(row) == {*ROW_FIELDS, "samples"} for row in report["results"])
    for source in ("shaped", "duplicates"):
        found = {row["method"] for row in rows_of(report, source=source, status="ok")}
        assert found == {"folded", "hnsw", "faiss-ivf", *INDEX_KINDS}
    assert [row["effort"] for row in rows_of(report, source="shaped", method="graph")] == [20, 80]
    assert all(row["check"] == "passed" for row in report["results"] if row["method"] != "folded")


def test_the_exact_index_is_right_whatever_the_ties(report):
    for row in rows_of(report, method="exact"):
        assert row["recall"] == row["worst_head_recall"] == 1.0
        assert row["mass"] == pytest.approx(row["best_mass"], rel=1e-4)
        assert row["visited_pct"] == 100
        assert row["bytes_read"] == 2 * 1500 * 32 * 4
        assert row["index_pct"] == 0


def test_more_effort_finds_more(report):
    for method in ("hnsw", "faiss-ivf", "ivf", "graph", "scan"):
        line = rows_of(report, source="shaped", method=method)
        assert line[-1]["recall"] >= line[0]["recall"]
        assert line[-1]["recall"] > 0.6
        assert line[-1]["visited_pct"] >= line[0]["visited_pct"]


def test_full_attention_is_attention_over_everything(report):
    for row in rows_of(report, method="folded"):
        assert row["err_topk"] < 1e-4


def test_every_estimator_has_an_error_and_a_time(report):
    for row in rows_of(report, method="scan"):
        for name in ESTIMATORS:
            assert 0 < row[f"err_{name}"] < 3
            assert row[f"step_{name}_us"] > 0
    assert rows_of(report, method="hnsw")[0]["err_lift"] is None


def test_a_sample_needs_one_key_more(monkeypatch):
    """The key after the last sets the weights of "lift"; the other estimators use all they asked for."""
    asked = []

    def build(kind, *args, lift=None, **kwargs):
        index = build_index(kind, *args, lift=lift, **kwargs)
        search = index.search
        index.search = lambda q, k, **options: (asked.append((lift is not None, k)), search(q, k, **options))[1]
        return index

    monkeypatch.setattr(recall_measure, "build_index", build)
    run(options(estimator="topk,lift,tail"))
    assert {pair for pair in asked if pair[1] > 1} == {(False, 20), (True, 21)}


def test_what_else_a_report_says(report):
    assert report["config"]["seeds"] == (3,)
    assert report["config"]["mode"] == "recall"
    assert report["bench"] == "recall"
    assert report["env"]["git"].keys() == {"commit", "dirty"}
    assert set(report["sources"]) == {"shaped 1500 seed 3", "duplicates 1500 seed 3"}
    assert report["sources"]["shaped 1500 seed 3"]["top_mass"] > 0.5
    assert {row["method"] for row in report["summary"]["at_recall"]} == {"hnsw", "faiss-ivf", *INDEX_KINDS}


def test_the_same_seeds_give_the_same_figures():
    plain = [
        [{name: value for name, value in row.items() if name not in TIMES | {"samples"}} for row in run["results"]]
        for run in (run(options(index="exact,graph,scan", effort=["graph=40", "scan=40"])) for _ in range(2))
    ]
    assert plain[0] == plain[1]
    assert plain[0][1]["recall"] > 0


def test_real_layers_come_from_one_capture(tmp_path):
    path = tmp_path / "real.safetensors"
    capture(400, seed=0, n_heldout=6).save(path)
    report = run(options(source="real", context="400,9000", capture=path, queries=6, estimator="topk"))
    assert [row["source"] for row in rows_of(report, context=400)] == ["real:0", "real:1", "real:2"]
    assert all(row["status"] == "ok" and row["queries"] == 6 for row in rows_of(report, context=400))
    assert all("S must be between 1 and 400" in row["reason"] for row in rows_of(report, context=9000))


def test_a_capture_is_written_where_none_is(tmp_path):
    path = tmp_path / "real.safetensors"
    report = run(options(source="real:1", context="300,500", capture=path, estimator="none"))
    assert path.is_file()
    assert [row["status"] for row in report["results"]] == ["ok", "ok"]


def test_a_model_that_is_not_there_is_a_row():
    for source in ("real", "real:0"):
        (row,) = run(options(source=source, model="/no/such/model"))["results"]
        assert (row["method"], row["status"]) == ("vectors", "failed")
        assert "no model at '/no/such/model'" in row["reason"]


def test_a_method_that_fails_says_why(monkeypatch):
    def refuse(kind, *args, **kwargs):
        if kind == "ivf":
            raise MemoryError("too large by far")
        return build_index(kind, *args, **kwargs)

    monkeypatch.setattr(recall_measure, "build_index", refuse)
    report = run(options(index="ivf,exact"))
    (row,) = rows_of(report, method="ivf")
    assert (row["status"], row["reason"]) == ("oom", "too large by far")
    assert rows_of(report, method="exact")[0]["status"] == "ok"
    assert "ivf: too large by far" in recall_format.render(report, "md")


def test_what_was_measured_is_kept_when_interrupted(monkeypatch):
    def interrupt(kind, *args, **kwargs):
        if kind == "ivf":
            raise KeyboardInterrupt
        return build_index(kind, *args, **kwargs)

    monkeypatch.setattr(recall_measure, "build_index", interrupt)
    done = CliRunner().invoke(
        cli.app,
        [
            "bench",
            "recall",
            "-c",
            "300",
            "--shape",
            "2,1,16",
            "--index",
            "exact,ivf",
            "--compare",
            "none",
            "-o",
            "json",
        ],
    )
    assert done.exit_code == 130
    report = json.loads(done.stdout)
    assert report["interrupted"]
    assert [row["method"] for row in report["results"]] == ["exact"]
    assert "interrupted: rows are missing" in report["notes"]


def test_truth_is_attention_over_all_keys(layer):
    found, truth = layer
    for h, t in ((0, 0), (3, 5)):
        scores = found.keys[h // 2].double() @ found.queries[h, t].double()
        weights = (scores * 32**-0.5).softmax(0)
        assert truth.worst[h, t] == pytest.approx(float(scores.topk(20).values[-1]), rel=1e-4)
        assert truth.best_mass[h, t] == pytest.approx(float(weights.topk(20).values.sum()), rel=1e-4)
        torch.testing.assert_close(
            truth.out[h, t], (weights @ found.values[h // 2].double()).float(), rtol=1e-3, atol=1e-4
        )


def test_recall_counts_what_is_missing(layer):
    found, truth = layer
    hits = build_index("exact", found.keys).search(found.queries[:, :1].float(), 20)
    ids, scores = hits.ids.copy(), hits.scores.copy()
    ids[:, :, 15:], scores[:, :, 15:] = -1, -np.inf
    worse = SearchResult(ids, scores, hits.visited)
    assert (truth.recall(hits, 0) == 1).all()
    assert (truth.recall(worse, 0) == 0.75).all()
    assert (truth.mass(worse, 0) < truth.mass(hits, 0)).all()


def test_hits_that_lie_are_found_out(layer):
    found, _ = layer
    query = found.queries[:, :1].float()
    hits = build_index("exact", found.keys).search(query, 20)
    assert check_hits(hits, query, found.keys) is None
    twice, wrong = hits.ids.copy(), hits.scores.copy()
    twice[1, 0, 1], wrong[2, 0, 3] = twice[1, 0, 0], wrong[2, 0, 3] * 1.01
    assert "found twice for head 1" in check_hits(hits._replace(ids=twice), query, found.keys)
    assert "scores of head 2" in check_hits(hits._replace(scores=wrong), query, found.keys)


def test_estimators_with_all_keys_are_exact(layer):
    found, _ = layer
    truth = Truth.of(found, 1500)
    query, tail = found.queries[:, :1].float().contiguous(), TailSummary(found.keys, found.values)
    for name, estimator in ESTIMATORS.items():
        index = build_index("exact", found.keys, lift=truth.scale if estimator.lifted else None)
        hits = index.search(query, 1500 + estimator.lifted)
        out = estimator.attend(query, found, hits, truth.scale, tail, index)
        assert truth.error(out, 0).max() < 1e-2, name


def test_rivals_search_raw_inner_products(layer):
    found, truth = layer
    query = found.queries[:, :1].float()
    # Over inner products HNSW reaches two keys in three, however wide its beam.
    for kind, effort, least in (("hnsw", 1500, 0.7), ("faiss-ivf", 38, 1.0)):
        rival = build_rival(kind, found.keys, 0)
        hits = rival.search(query, 20, effort=effort)
        assert truth.recall(hits, 0).mean() >= least
        assert check_hits(hits, query, found.keys) is None
        assert (hits.visited > 0).all()
        assert rival.nbytes > 4 * 2 * 1500 * 32


def row(recall, us, context=1000, method="graph", **known):
    numbers = {"recall": recall, "search_us": us, "visited_pct": us / 100, "bytes_read": us}
    return blank_row(20, source="shaped", context=context, seed=0, method=method, status="ok", **numbers, **known)


def test_time_at_equal_recall_is_read_off_the_curve():
    (found,) = at_recall([row(0.9, 100.0, effort=1), row(1.0, 400.0, effort=2)], 0.95)
    assert found["search_us"] == pytest.approx(200)
    assert found["visited_pct"] == pytest.approx(2)
    assert not found["bound"]


def test_curves_that_end_before_or_begin_after():
    (never,) = at_recall([row(0.5, 100.0), row(0.9, 300.0)])
    (always,) = at_recall([row(0.99, 100.0, effort=1), row(1.0, 300.0, effort=2)])
    assert never["search_us"] is None
    assert (always["search_us"], always["bound"]) == (100, True)


def test_time_at_equal_error_is_that_of_the_best_estimator():
    line = [
        row(0.9, 1.0, effort=1, err_topk=0.04, step_topk_us=100.0, err_lift=0.08, step_lift_us=10.0),
        row(1.0, 2.0, effort=2, err_topk=0.01, step_topk_us=900.0, err_lift=0.005, step_lift_us=20.0),
    ]
    (found,) = at_error(line, 0.02, ("topk", "lift"))
    assert found["estimator"] == "lift"
    assert 10 < found["step_us"] < 20
    assert at_error(line, 0.001, ("topk", "lift"))[0]["step_us"] is None


def test_growth_compares_the_ends():
    line = [row(0.9, 100.0, effort=1), row(1.0, 400.0, effort=2), row(0.1, 5.0, method="page")]
    longer = [row(0.9, 130.0, context=8000, effort=1), row(1.0, 520.0, context=8000, effort=2)]
    ends = {"source": "shaped", "seed": 0, "method": "graph", "from": 1000, "to": 8000}
    assert growth(at_recall(line + longer, 0.95)) == [{**ends, "ratio": pytest.approx(1.3)}]


def test_growth_is_not_known_where_the_least_effort_is_too_much():
    found = at_recall([row(1.0, 100.0), row(1.0, 130.0, context=8000)], 0.95)
    assert growth(found)[0]["ratio"] is None


def test_json_and_csv_hold_the_rows(report):
    read = json.loads(recall_format.render(report, "json"))
    assert len(read["results"]) == len(report["results"])
    lines = list(csv.DictReader(io.StringIO(recall_format.render(report, "csv"))))
    assert list(lines[0]) == list(ROW_FIELDS)
    assert len(lines) == len(report["results"])


def test_markdown_has_both_tables_and_the_properties(report):
    text = recall_format.render(report, "md")
    for heading in (
        "| source | keys | seed | method | effort | status | recall |",
        "error topk",
        "At recall 0.95",
        "top_mass",
    ):
        assert heading in text


def test_a_picture_per_source(report, tmp_path):
    pictures = recall_format.plot(report, tmp_path)
    assert [path.name for path in pictures] == ["recall-shaped-1500-seed3.png", "recall-duplicates-1500-seed3.png"]
    assert all(path.stat().st_size > 10_000 for path in pictures)


def test_the_command_writes_what_it_is_told_to(tmp_path):
    out = tmp_path / "report.csv"
    arguments = "-s zeros -c 300 --shape 2,1,16 --index exact --compare none --queries 2 --top-k 5 --estimator topk"
    done = CliRunner().invoke(
        cli.app, ["bench", "recall", *arguments.split(), "--out", str(out), "--plot", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "| zeros | 300 | 0 | exact |" in done.stdout
    assert out.read_text().startswith("source,context,seed,method")
    assert (tmp_path / "recall-zeros-300-seed0.png").is_file()
