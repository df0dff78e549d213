"""`bench long`: rows along an answer, and what it says of them."""

import pytest
from tiny_models import save_tiny_chat_model

from retrieval_attn import load
from retrieval_attn.bench.long import command as long_command
from retrieval_attn.bench.long.format import verdict
from retrieval_attn.bench.long.measure import measure
from retrieval_attn.bench.report.read import read_report
from retrieval_attn.cli import main
from retrieval_attn.config import RetrievalConfig


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    config = RetrievalConfig(index="scan", n_sink=4, n_local=32, exact_below=0)
    return load(save_tiny_chat_model(tmp_path_factory.mktemp("model")), config)


def test_rows_follow_the_answer(llm):
    rows = list(measure(llm, n_prompt=6000, n_answer=124, every=60, seed=0))
    assert [row["new_tokens"] for row in rows] == [62, 122, 124]
    assert rows[0]["kv_mb"] < rows[-1]["kv_mb"]
    for row in rows:
        assert 0 < row["median_ms"] <= row["p99_ms"] <= row["worst_ms"]
        assert row["indexed"] > 0.9


def test_the_report_says_whose_it_is_whatever_its_file_is_called(monkeypatch, tmp_path):
    row = {"new_tokens": 2, "tokens_per_s": 100.0, "rss_mb": 500.0, "kv_mb": 10.0, "index_mb": 2.0}
    monkeypatch.setattr(long_command, "load", lambda *given, **more: None)
    monkeypatch.setattr(long_command, "measure", lambda *given: [row])
    monkeypatch.setattr(long_command, "table", lambda *given: "")
    out = tmp_path / "all.json"
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "long", "-o", str(out)])
    found = read_report(out)
    assert (found.kind, found.rows[0]["new_tokens"]) == ("long", 2)


def test_the_verdict_compares_first_and_last():
    rows = [
        {"tokens_per_s": 100.0, "rss_mb": 500.0, "kv_mb": 10.0, "index_mb": 2.0},
        {"tokens_per_s": 90.0, "rss_mb": 540.0, "kv_mb": 40.0, "index_mb": 9.0},
    ]
    assert verdict(rows) == (
        "tokens per second fell by 10.0 % from the first row to the last; the process grew by 40.0 MB, keys and values "
        "by 30.0 MB, indexes by 7.0 MB"
    )
    assert "ask for more tokens" in verdict(rows[:1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--index", "hnsw"], "index must be one of"),
        (["-o", "/missing/rows.json"], "--out"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "long", *words])
    assert says in capsys.readouterr().err
