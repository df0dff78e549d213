"""The benchmark of kernels: what it accepts, what it counts, and that no number stands beside a wrong output."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from retrieval_attn.bench.kernels import format as kernels_format
from retrieval_attn.bench.kernels import measure_prompt as kernels_measure
from retrieval_attn.bench.kernels import methods as kernels_prefill
from retrieval_attn.bench.kernels.measure import run
from retrieval_attn.bench.kernels.measure_prompt import over_prompt, places
from retrieval_attn.bench.kernels.methods import Chunk, Result, count_pairs
from retrieval_attn.bench.kernels.options import PATTERNS, Asked, make_options
from retrieval_attn.bench.kernels.rows import DENSE, ROW_FIELDS, SQUARE, Limits, blank_row, compare, set_shares
from retrieval_attn.bench.kernels.truth import judge, truth_of
from retrieval_attn.cli import app
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.kernels import AttentionState, HeadPattern, attend_dense, reference
from retrieval_attn.kernels.sparse.coverage import Layout
from retrieval_attn.kernels.sparse.patterns import fixed_index


def options(**changes):
    asked = Asked(context="1k,2600", shape="4,2,64", mass=0.9, chunk=512, repeat=2, dtype="float32", device="cpu")
    return make_options(replace(asked, **changes), RetrievalConfig())


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Peaks take long to measure, and a hundred calls are not needed to test one."""
    monkeypatch.setattr("retrieval_attn.bench.shared.machine.copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr("retrieval_attn.bench.kernels.measure.peak_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr("retrieval_attn.bench.kernels.measure_steps.CALLS", 2)


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval_attn.bench.shared.machine.copy_bandwidth", lambda device: 1e10)
        patch.setattr("retrieval_attn.bench.kernels.measure.peak_flops", lambda device, dtype: 1e12)
        patch.setattr("retrieval_attn.bench.kernels.measure_steps.CALLS", 2)
        yield run(options())


def peaky(H=4, G=2, T=200, S=300, D=64):
    keys, values = torch.randn(1, G, S, D), torch.randn(1, G, S, D)
    needle = torch.randint(S - T, (1, H, T, 1)).expand(-1, -1, -1, D)
    query = keys.repeat_interleave(H // G, 1).gather(2, needle) + 0.5 * torch.randn(1, H, T, D)
    return Chunk(query, keys, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": "8x"}, "--context must be tokens such as 8k"),
        ({"patterns": "auto,tri"}, "--patterns must be of auto, mass_vertical_slash, .*, block_sparse .*got 'tri'"),
        ({"steps": "far"}, "--steps must be of near, merge"),
        ({"source": "real"}, "--source must be one of real:<layer>, shaped, shaped_mixed, got 'real'"),
        ({"shape": "4,3,64"}, "--shape H,G,D needs H a multiple of G"),
        ({"shape": "embedded"}, "take --source real:LAYER"),
        ({"mass": 1.0}, "--mass must be above 0 and below 1"),
        ({"chunk": 0}, "--chunk must be at least 1"),
        ({"repeat": 0}, "--repeat must be at least 1"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"device": "tpu"}, "--device must be one of"),
    ],
)
def test_bad_options_are_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        options(**change)
    assert "\n" not in str(caught.value)


def test_importing_the_command_is_quick():
    code = (
        "import retrieval_attn.bench.kernels.command, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_row_per_length_and_kernel(report):
    prefill = ["sdpa", "dense", *PATTERNS, SQUARE]
    wanted = [(1024, name) for name in prefill] + [(640, "near"), (640, "merge")]
    wanted += [(2600, name) for name in prefill]
    assert [(row["context"], row["method"]) for row in report["results"]] == wanted
    for row in report["results"]:
        assert set(row) == {*ROW_FIELDS, "samples"}
        assert (row["status"], row["reason"], row["check"]) == ("ok", None, "passed")
        assert 0 < row["total_p20_ms"] <= row["total_ms"] <= row["total_p80_ms"]


def test_dense_methods_leave_nothing_out(report):
    for row in report["results"]:
        if row["method"] in DENSE:
            assert row["density"] == 1
            assert row["rel_error"] < 1e-5


def test_patterns_say_what_they_left_out(report):
    """At 2600 tokens the paper's sizes still read everything; a budget of mass leaves something out, and it shows."""
    found = {(row["context"], row["method"]): row for row in report["results"]}
    for pattern in PATTERNS[2:]:
        assert found[2600, pattern]["density"] == pytest.approx(1)
        assert found[2600, pattern]["rel_error"] < 1e-5
    auto = found[1024, "auto"]
    assert 0 < auto["density"] < 1
    assert 0.8 < auto["mass"] < 1
    assert auto["rel_error"] > 1e-3


def test_speed_is_relative_to_the_same_length(report):
    for row in report["results"]:
        if row["part"] != "prefill":
            continue
        times = {r["method"]: r["total_ms"] for r in report["results"] if r["context"] == row["context"]}
        best = min(times[name] for name in DENSE if name in times)
        assert row["speedup_vs_sdpa"] == pytest.approx(times["sdpa"] / row["total_ms"])
        assert row["speedup_vs_best_dense"] == pytest.approx(best / row["total_ms"])


def test_a_failed_rival_gives_no_speed():
    rows = [blank_row(10, name) | {"status": "ok", "total_ms": 2.0} for name in ("sdpa", "auto")]
    compare([rows[0] | {"status": "failed"}, rows[1]])
    assert (rows[1]["speedup_vs_sdpa"], rows[1]["speedup_vs_best_dense"]) == (None, None)


def test_shares_of_what_the_machine_can_do():
    row = blank_row(10, "x") | {"total_ms": 2.0}
    set_shares(row, Limits(flops=4e12, bandwidth=1e10), flops=2e9, n_bytes=1e7)
    assert (row["tflop_per_s"], row["peak_share"]) == pytest.approx((1.0, 0.25))
    assert (row["gb_per_s"], row["bandwidth_share"]) == pytest.approx((5.0, 0.5))


def test_places_of_chunks():
    assert places(1000, 512) == [512, 1000]
    assert places(100, 512) == [100]
    assert places(8192, 2048) == [2048, 4096, 6144, 8192]
    assert places(32768, 2048) == [8192, 16384, 24576, 32768]
    assert places(2600, 512) == [1024, 1536, 2048, 2600]


@pytest.mark.parametrize(("S", "chunk"), [(32768, 2048), (2600, 512), (1000, 512), (100, 512), (8192, 2048)])
def test_costs_that_grow_along_a_line_are_summed_exactly(S, chunk):
    """A whole chunk that ends at n costs 7 + 2 n; a short last one, its share of that."""
    ends = [*range(chunk, S, chunk), S]
    sizes = [min(chunk, S)] * (len(ends) - 1) + [S - (ends[-2] if len(ends) > 1 else 0)]
    true = sum((7 + 2 * end) * size / min(chunk, S) for end, size in zip(ends, sizes, strict=True))
    stops = places(S, chunk)
    assert sum(over_prompt(S, chunk, stops, [7.0 + 2 * stop for stop in stops])) == pytest.approx(true)


def test_no_chunk_costs_less_than_nothing():
    assert min(over_prompt(32768, 2048, [8192, 16384, 24576, 32768], [1.0, 9.0, 17.0, 25.0])) == 0


@pytest.mark.parametrize(("T", "S"), [(200, 200), (200, 300), (1, 300), (63, 1000)])
@pytest.mark.parametrize(
    "pattern", [HeadPattern("a_shape", 5, 70), HeadPattern("vertical_slash", 9, 30), HeadPattern("block_sparse", 3)]
)
def test_pairs_are_counted_as_the_definition_reads_them(T, S, pattern):
    chunk, layout = peaky(T=T, S=S) if T < S else peaky(T=T, S=S + 1), Layout(T, S)
    query, keys = chunk.query[0], chunk.keys[0][:, :S]
    index = fixed_index(query, keys, chunk.scale, pattern, layout)
    causal = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    listed = reference.listed_keys(index, S).repeat_interleave(index.rows, dim=2)[:, :, :T] & causal
    # Queries of a last run that is not full are as many as there are.
    assert count_pairs(index, T, S) == int(listed.sum())


def test_density_of_a_whole_pattern_is_one():
    chunk = peaky()
    assert kernels_prefill.density_of("a_shape", chunk) == pytest.approx(1)


def test_what_was_read_is_judged_by_what_was_left_out():
    """A state over some of the keys passes, however wrong it is; the same output with another lse does not."""
    chunk = peaky()
    truth = truth_of(chunk)
    mask = torch.rand(1, 1, 1, 300) > 0.5
    mask[..., 0] = True
    some = reference.attend_near(*chunk, chunk.scale, mask & torch.ones(200, 300, dtype=torch.bool).tril(100))
    verdict = judge(Result(*some, 0.5), truth)
    assert verdict.problem is None
    assert verdict.mass < 0.9
    assert verdict.squared[0] > 0.01 * verdict.squared[1]
    whole = attend_dense(*chunk, chunk.scale, causal=True)
    assert judge(Result(*whole, 1.0), truth).problem is None
    assert judge(Result(some.out, whole.lse, 0.5), truth).problem.endswith("as the mass left out allows")
    assert judge(Result(whole.out, whole.lse + 0.1, 1.0), truth).problem.startswith("the softmax denominator is 1.1")
    assert judge(Result(whole.out * torch.nan, None, 1.0), truth).problem == "the output is not finite"
    assert judge(Result(torch.zeros_like(whole.out), None, 1.0), truth).problem is not None


def test_truth_is_the_definition():
    chunk = peaky(T=50)
    truth, true = truth_of(chunk), reference.attend_dense(*(x.double() for x in chunk), chunk.scale, causal=True)
    torch.testing.assert_close(truth.out, true.out[0, :, truth.rows].float())
    torch.testing.assert_close(truth.lse, true.lse[0, :, truth.rows].float())


def test_a_wrong_output_gives_no_number(monkeypatch):
    def wrong(query, keys, values, scale, causal=False):
        state = attend_dense(query, keys, values, scale, causal)
        return AttentionState(state.out * 1.01, state.lse)

    monkeypatch.setattr(kernels_prefill, "attend_dense", wrong)
    rows = {row["method"]: row for row in run(options(context="600", patterns="none", steps="none"))["results"]}
    assert (rows["dense"]["status"], rows["dense"]["check"]) == ("failed", "failed")
    assert "times as far from exact attention" in rows["dense"]["reason"]
    assert rows["dense"]["speedup_vs_sdpa"] is None
    assert rows["sdpa"]["status"] == "ok"


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError("no room"), "oom"), (RuntimeError("broken\nin two lines"), "failed")]
)
def test_a_failing_kernel_is_a_row(monkeypatch, error, status):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(kernels_prefill, "attend_adaptive", fail)
    monkeypatch.setattr("retrieval_attn.bench.kernels.measure_steps.attend_near", fail)
    found = run(options(context="600", patterns="auto", steps="near"))
    rows = {row["method"]: row for row in found["results"]}
    for name in ("auto", "near"):
        assert (rows[name]["status"], rows[name]["reason"]) == (status, str(error).split("\n")[0])
    assert rows["sdpa"]["status"] == rows[SQUARE]["status"] == "ok"
    kernels_format.render(found, "md")


def test_a_prompt_too_large_is_a_row():
    rows = run(options(context="4096m,600", patterns="none", steps="merge"))["results"]
    assert (rows[0]["method"], rows[0]["status"]) == ("vectors", "oom")
    assert "GiB of CPU memory" in rows[0]["reason"]
    assert [row["method"] for row in rows[1:]] == ["sdpa", "dense", SQUARE, "merge"]


def test_one_call_is_left_out_where_it_takes_too_long(monkeypatch):
    monkeypatch.setattr(kernels_measure, "MOST_SECONDS", 0.0)
    rows = run(options(context="600", patterns="none", steps="none"))["results"]
    assert (rows[-1]["method"], rows[-1]["status"]) == (SQUARE, "skipped")


def test_a_real_layer_has_its_own_shape():
    rows = run(options(context="1100", source="real:1", patterns="auto", steps="near,merge"))["results"]
    assert {row["status"] for row in rows} == {"ok"}


def test_json_holds_everything(report):
    read = json.loads(kernels_format.render(report, "json"))
    assert set(read) == {"schema_version", "bench", "env", "config", "results", "notes"}
    assert read["bench"] == "kernels"
    assert (read["config"]["H"], read["config"]["mode"], read["env"]["matmul_flops_per_s"]) == (4, "kernels", 1e12)


def test_csv_is_the_rows(report):
    rows = list(csv.DictReader(io.StringIO(kernels_format.render(report, "csv"))))
    assert [row["method"] for row in rows] == [row["method"] for row in report["results"]]


def test_a_table_ends_with_its_rows(report):
    text = kernels_format.render(report, "md")
    assert "| length | kernel |" in text
    assert json.loads(text.strip().split("\n")[-1]) == json.loads(json.dumps(report["results"]))


@pytest.mark.parametrize("name", ["out.png", "out.svg"])
def test_a_picture(report, tmp_path, name):
    pytest.importorskip("matplotlib")
    kernels_format.plot(report, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000
    kernels_format.plot({**report, "results": []}, tmp_path / name)


def test_the_command(tmp_path):
    arguments = "bench kernels -c 600 --patterns a_shape --steps merge --shape 4,2,64 -r 1 --device cpu -o csv --out"
    done = CliRunner().invoke(app, [*arguments.split(), str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "600,a_shape,ok" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["config"]["patterns"] == ["a_shape"]


def test_files_that_cannot_be_written_are_told_at_once(tmp_path):
    for flag, value in (("--out", tmp_path / "no" / "x.json"), ("--plot", tmp_path / "x.gif")):
        done = CliRunner().invoke(app, ["bench", "kernels", flag, str(value)])
        assert isinstance(done.exception, ValueError)
        assert str(done.exception).startswith(flag)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="PyTorch sees no CUDA device"):
        run(options(device="cuda"))
