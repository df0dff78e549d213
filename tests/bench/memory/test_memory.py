"""The benchmark of memory: a process per context, the peak of every phase beside its plan."""

import json

import pytest
from typer.testing import CliRunner

from retrieval_attn import cli
from retrieval_attn.bench.memory import format as memory_format
from retrieval_attn.bench.memory import measure as memory_measure
from retrieval_attn.bench.memory import one_context


@pytest.fixture(scope="module")
def row():
    return memory_measure.run_context(
        {"tokens": 4096, "model": None, "index": "scan", "seed": 0, "device": "cpu", "save": None}
    )


@pytest.mark.long
def test_every_phase_is_measured_near_its_plan(row):
    assert row["status"] == "ok", row["reason"]
    assert set(row["planned"]) == set(row["measured"]) == set(memory_format.PHASES)
    *_, peak = memory_format.peak_lines(row)
    assert peak["phase"] == "peak"
    assert 0.85 < peak["host_ratio"] < 1.15
    assert peak["device_ratio"] is None


def test_the_times_are_of_one_session(row):
    assert row["answers_right"] == row["answers"] == 3
    assert row["ttft_s"] >= row["prefill_s"] + row["build_s"]
    assert 0 < row["second_question_s"] < row["ttft_s"]
    assert 0 < row["restore_s"] < row["first_token_after_restore_s"]


def test_tables_and_report(row):
    failed = {"context": "1m", "index": "scan", "status": "failed", "reason": "no room"}
    text = memory_format.as_text([row, failed])
    assert text.count("| 4k | scan |") == len(memory_format.PHASES) + 2
    assert text.endswith("- 1m scan: no room")
    assert memory_format.as_text([failed]) == "- 1m scan: no room"
    report = json.loads(json.dumps(memory_measure.as_report([row], {"index": "scan"}), allow_nan=False))
    assert report["results"][0]["tokens"] == row["tokens"]
    assert report["bench"] == "memory"
    assert report["env"]["ram_bytes"] > 0


@pytest.mark.long
def test_a_context_that_fails_is_a_row_with_the_reason():
    row = memory_measure.run_context(
        {"tokens": 5, "model": None, "index": "scan", "seed": 0, "device": "cpu", "save": None}
    )
    assert row["status"] == "failed"
    assert "tokens must be between" in row["reason"]


def test_a_peak_begins_anew_with_its_phase():
    peaks = one_context.Peaks()
    if not peaks.exact:
        pytest.skip("this system has no /proc/self/clear_refs")
    with peaks.phase("large"):
        assert len(b"x" * (200 << 20)) == 200 << 20
    with peaks.phase("small"):
        pass
    assert peaks.host["large"] - peaks.host["small"] > 150 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "8x"], "--context must be tokens such as 8k"),
        (["--index", "tree"], "index must be"),
        (["--device", "tpu"], "--device must be"),
        (["--save", "/nowhere"], "--save must be a folder that exists"),
        (["-o", "/nowhere/a.json"], "--out must lie in a folder that exists"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["bench", "memory", *arguments], catch_exceptions=False)
