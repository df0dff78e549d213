"""`bench suite`: every quality benchmark, one after the other, and a page about them."""

import json

import pytest
import typer

from retrieval_attn.bench.suite import command as suite
from retrieval_attn.cli import main

NAMES = ["needle", "ruler", "scbench", "ppl", "compare", "fidelity"]


def call(*words):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "suite", *map(str, words)])
    return leaving.value.code or 0


@pytest.mark.long
def test_a_smoke_run_of_everything(tmp_path, capsys):
    folder = tmp_path / "new"
    assert call(folder, "-c", "1k", "--limit", "1") == 0
    for name in NAMES:
        report = json.loads((folder / f"{name}.json").read_text())
        assert report["bench"] == name
        assert any(row["status"] == "ok" for row in report["results"])
        assert (folder / f"{name}.png").stat().st_size > 10_000
    page = (folder / "report.html").read_text()
    assert all(f"{name}.json" in page for name in NAMES)
    # Done already: nothing is run again.
    before = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in NAMES}
    assert call(folder, "-c", "1k", "--limit", "1", "--resume") == 0
    assert before == {name: (folder / f"{name}.json").stat().st_mtime_ns for name in NAMES}


def test_one_that_fails_does_not_keep_the_others_from_running(tmp_path, capsys, monkeypatch):
    called = []

    def fake(name, words):
        called.append(name)
        if name == "ruler":
            raise MemoryError("no room for 9 GiB")
        return 0

    monkeypatch.setattr(suite, "_call", fake)
    assert call(tmp_path, "-c", "1k") == 1
    said = capsys.readouterr().err
    assert called == NAMES
    assert "ruler: no room for 9 GiB" in said
    assert said.strip().endswith("failed: ruler")


@pytest.mark.parametrize(
    ("words", "says"), [(["{file}"], "FOLDER cannot be made"), (["{new}", "-c", "8k,16k"], "one length")]
)
def test_bad_input_is_one_line(words, says, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert call(*(word.format(file=file / "in", new=tmp_path / "new") for word in words)) == 2
    assert says in capsys.readouterr().err


def test_the_exit_status_of_a_benchmark_counts(tmp_path, capsys, monkeypatch):
    """Through the real call: a command that ends with 1 has failed, though it raised nothing."""

    def command(**options):
        raise typer.Exit(1)

    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("retrieval_attn.bench.ppl.command.command", lambda: command())
    assert suite._call("ppl", []) == 1
    monkeypatch.setattr("retrieval_attn.bench.ppl.command.command", lambda: interrupted())
    with pytest.raises(KeyboardInterrupt):
        suite._call("ppl", [])


def test_resuming_with_other_settings_is_refused(tmp_path, capsys):
    report = {"config": {"seed": 0, "contexts": [256, 1024], "model": None}, "results": []}
    (tmp_path / "needle.json").write_text(json.dumps(report))
    assert call(tmp_path, "-c", "1k", "--seed", "7", "--resume") == 2
    assert "seed was 0 in" in capsys.readouterr().err
