"""The latency benchmark: what it accepts, what it writes, and that its numbers belong to right outputs."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from retrieval_attn.bench.latency import command as latency
from retrieval_attn.bench.latency import format as latency_format
from retrieval_attn.bench.latency import measure_layer as latency_layer
from retrieval_attn.bench.latency.format import ROW_FIELDS
from retrieval_attn.bench.latency.measure import run
from retrieval_attn.bench.latency.options import Asked, make_options
from retrieval_attn.bench.methods import rivals
from retrieval_attn.bench.shared.options import parse_names, parse_shape
from retrieval_attn.bench.shared.pictures import check_plot
from retrieval_attn.bench.shared.report import SCHEMA_VERSION, short
from retrieval_attn.config import RetrievalConfig

CONFIG_NAMES = {field.name for field in fields(RetrievalConfig)} - {"index"}


def options(**changes):
    """A small sweep; changes are of `Asked` or of the config."""
    own = {name: changes.pop(name) for name in CONFIG_NAMES & set(changes)}
    asked = Asked(
        context="1500",
        gen=2,
        repeat=2,
        warmup=0,
        index="exact",
        compare="full,folded",
        layers=1,
        shape="4,2,32",
        dtype="float32",
        device="cpu",
    )
    return make_options(replace(asked, **changes), RetrievalConfig(**{"top_k": 20, "exact_below": 0, **own}))


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    """Sweeping the caches and measuring bandwidth take long and are not what is tested."""
    monkeypatch.setattr(latency_layer, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr("retrieval_attn.bench.shared.machine.copy_bandwidth", lambda device: 1e10)


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_layer, "cache_bytes", lambda: 1 << 16)
        patch.setattr("retrieval_attn.bench.shared.machine.copy_bandwidth", lambda device: 1e10)
        yield run(options(context="300,1500", index="exact,ivf", layers=2, warmup=1))


def test_names():
    assert parse_names("graph,exact,graph", ("exact", "graph"), "--index") == ("graph", "exact")
    assert parse_names("none", ("exact",), "--index") == ()
    with pytest.raises(ValueError, match=r"--index must be of exact, graph .*got 'hnsw'"):
        parse_names("hnsw", ("exact", "graph"), "--index")


def test_shapes():
    assert parse_shape("llama3-8b") == (32, 8, 128)
    assert parse_shape("4,2,32") == (4, 2, 32)
    assert parse_shape("embedded") is None
    for wrong in ("llama4", "4,2", "4,3,32", "4,2,33", "0,0,0"):
        with pytest.raises(ValueError, match=r"--shape"):
            parse_shape(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": "fast"}, "--compare must be of full, folded"),
        ({"index": "none", "compare": "none"}, "name no method"),
        ({"dtype": "int8"}, "--dtype must be one of bfloat16, float32"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda"),
        ({"gen": 0}, "--gen must be at least 1"),
        ({"shape": "embedded"}, "--layers goes with"),
        ({"prefill": "auto"}, "prefill goes with --shape embedded or --model; layers alone run no prefill"),
        ({"device_kv_budget": 0}, "device_kv_budget goes with --shape embedded or --model"),
    ],
)
def test_bad_options_are_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        options(**change)
    assert "\n" not in str(caught.value)


def test_a_model_takes_what_layers_refuse():
    assert options(shape="embedded", layers=None, prefill="auto").as_dict()["prefill"] == "auto"


@pytest.mark.parametrize("word", ["followup=retrieve", "index=scan"])
def test_what_this_benchmark_has_no_use_for_is_no_option(word):
    app = typer.Typer()
    app.command()(latency.command)
    with pytest.raises(ValueError, match=f"--set: unknown option '{word.partition('=')[0]}'"):
        CliRunner().invoke(app, ["--set", word], catch_exceptions=False)


def test_layers_of_a_shape():
    assert options(shape="llama3-8b", layers=None).layers == 32


def test_importing_the_command_is_quick():
    code = (
        "import retrieval_attn.bench.latency.command, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_row_per_context_and_method(report):
    assert [(row["context"], row["method"]) for row in report["results"]] == [
        (n, method) for n in (300, 1500) for method in ("full", "folded", "exact", "ivf")
    ]
    for row in report["results"]:
        assert set(row) == {*ROW_FIELDS, "samples"}
        assert (row["status"], row["reason"], row["check"]) == ("ok", None, "passed")
        assert row["total_p20_ms"] <= row["total_ms"] <= row["total_p80_ms"]
        assert len(row["samples"]["total_ms"]) == row["steps"] == 4
        assert row["speedup_vs_full"] > 0
        assert row["speedup_vs_folded"] > 0


def test_parts_of_a_step_add_up(report):
    for row in report["results"]:
        parts = [row["samples"].get(f"{part}_ms") for part in ("near", "search", "gather", "merge", "rest")]
        if row["method"] in rivals.FUNCTIONS:
            assert parts == [None] * 5
            continue
        for *step, total in zip(*parts, row["samples"]["total_ms"], strict=True):
            assert sum(step) == pytest.approx(total)
            assert min(step) >= 0


def test_rivals_compute_full_attention(report):
    for row in report["results"]:
        if row["method"] in rivals.FUNCTIONS:
            assert row["rel_error"] < 1e-5


def test_recall_and_visits(report):
    found = {(row["context"], row["method"]): row for row in report["results"]}
    # All 300 tokens are near, so there is nothing to visit.
    assert found[300, "exact"]["visited_pct"] == 0
    assert found[300, "exact"]["rel_error"] < 1e-5
    assert found[1500, "exact"]["visited_pct"] == pytest.approx(100)
    assert found[1500, "exact"]["recall"] == 1
    assert 0 < found[1500, "ivf"]["recall"] <= 1


def test_exact_index_over_all_keys_is_full_attention():
    (row,) = run(options(index="exact", compare="none", top_k=4000))["results"]
    assert row["rel_error"] < 1e-5


def test_folded_equals_full():
    query, keys, values = torch.randn(1, 8, 1, 32), torch.randn(1, 2, 700, 32), torch.randn(1, 2, 700, 32)
    full, folded = (rivals.FUNCTIONS[name](query, keys, values) for name in ("full", "folded"))
    torch.testing.assert_close(full, folded)
    torch.testing.assert_close(full[0, :, 0], latency_layer.exact_attention(query, keys[0], values[0]))


def test_a_wrong_output_gives_no_number(monkeypatch):
    monkeypatch.setitem(rivals.FUNCTIONS, "folded", lambda q, k, v: rivals.full(q, k, v) * 1.01)
    rows = run(options())["results"]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "away from attention over the keys it selected" in rows[1]["reason"]
    assert rows[0]["speedup_vs_folded"] is None


def test_nan_fails_the_check(monkeypatch):
    monkeypatch.setitem(rivals.FUNCTIONS, "full", lambda q, k, v: q * torch.nan)
    (row,) = run(options(index="none", compare="full"))["results"]
    assert (row["status"], row["check"]) == ("failed", "failed")
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError("no room"), "oom"), (RuntimeError("broken\nin two lines"), "failed")]
)
def test_a_failing_method_is_a_row(monkeypatch, error, status):
    def fail(query, keys, values):
        raise error

    monkeypatch.setitem(rivals.FUNCTIONS, "full", fail)
    rows = run(options())["results"]
    assert [row["status"] for row in rows] == [status, "ok", "ok"]
    assert rows[0]["reason"] == str(error).split("\n")[0]
    assert rows[2]["speedup_vs_full"] is None


def test_a_context_too_large_is_rows():
    rows = run(options(context="1024m,1500", index="exact"))["results"]
    assert [row["status"] for row in rows] == ["oom"] * 3 + ["ok"] * 3
    assert "GiB of CPU memory" in rows[0]["reason"]


def test_without_check_the_table_says_so():
    report = run(options(check=False))
    assert {row["check"] for row in report["results"]} == {None}
    assert "do not quote these numbers" in latency_format.render(report, "md")


def test_json_holds_everything(report):
    read = json.loads(latency_format.render(report, "json"))
    assert read["schema_version"] == SCHEMA_VERSION
    assert set(read) == {"schema_version", "bench", "env", "config", "results", "notes"}
    assert read["bench"] == "latency"
    assert {"git", "packages", "cpu", "cores", "isa", "ram_bytes", "gpu", "date", "threads"} <= set(read["env"])
    assert (read["config"]["H"], read["config"]["mode"], read["config"]["seed"]) == (4, "layer", 0)


def test_csv_is_the_rows(report):
    rows = list(csv.DictReader(io.StringIO(latency_format.render(report, "csv"))))
    assert [row["method"] for row in rows] == [row["method"] for row in report["results"]]
    assert float(rows[0]["total_ms"]) == report["results"][0]["total_ms"]
    assert tuple(rows[0]) == ROW_FIELDS


def test_markdown_is_a_table(report):
    text = latency_format.render(report, "md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(report["results"])
    assert len({line.count("|") for line in lines}) == 1
    for method in ("full", "folded", "exact", "ivf"):
        assert f"bound of {method} at 1500:" in text


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    for name, begins in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        latency_format.plot(report, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_plot_without_a_good_row(report, tmp_path):
    pytest.importorskip("matplotlib")
    bad = {**report, "results": [latency_format.blank_row(8, "full")]}
    latency_format.plot(bad, tmp_path / "a.png")


def test_plot_is_refused_before_the_run(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--plot must end in .png or .svg"):
        check_plot(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match=r"--plot must lie in a folder that exists"):
        check_plot(tmp_path / "no" / "a.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'retrieval-attn\[plot\]'"):
        check_plot(tmp_path / "a.png")


def test_short():
    assert [short(n) for n in (8192, 1 << 20, 5000, 131072)] == ["8k", "1m", "5000", "128k"]


@pytest.mark.parametrize("form", ["md", "json", "csv"])
def test_the_command_writes_one_document(form, tmp_path):
    app = typer.Typer()
    app.command()(latency.command)
    arguments = "-c 700 -n 1 -r 1 --warmup 0 --index none --compare full --shape 4,2,32 --layers 1 --device cpu"
    out = tmp_path / "all.json"
    result = CliRunner().invoke(app, [*arguments.split(), "-o", form, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["results"][0]["method"] == "full"
    if form == "json":
        assert json.loads(result.stdout)["results"][0]["status"] == "ok"
    elif form == "csv":
        assert len(result.stdout.splitlines()) == 2
    else:
        assert "| 700 | full | ok |" in result.stdout


def test_a_whole_model(tmp_path):
    from tiny_models import save_tiny_chat_model

    model = str(save_tiny_chat_model(tmp_path / "model"))
    chosen = options(model=model, layers=None, context="1000,9k", gen=3, repeat=2, top_k=4000)
    report = run(chosen)
    rows = {(row["context"], row["method"]): row for row in report["results"]}
    for method in ("full", "folded", "exact"):
        row = rows[1000, method]
        assert (row["status"], row["check"], row["steps"]) == ("ok", "passed", 6)
        assert row["rel_error"] < 1e-3
        assert row["ttft_ms"] >= row["prefill_ms"] > 0
        assert row["kv_bytes"] > 0
        assert (rows[9216, method]["status"], rows[9216, method]["total_ms"]) == ("failed", None)
        assert "longer than the model's 8192" in rows[9216, method]["reason"]
    assert rows[1000, "exact"]["visited_pct"] == pytest.approx(100)
    assert "logit error" in latency_format.render(report, "md")
    assert report["config"]["mode"] == "model"


def test_folded_is_known_to_transformers_only_inside():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with rivals.folded_registered() as name:
        assert name in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert rivals.FOLDED not in ALL_ATTENTION_FUNCTIONS.valid_keys()
