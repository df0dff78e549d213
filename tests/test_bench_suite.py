"""`bench suite`: every quality benchmark, one after the other, and a page about them."""

import json

import pytest

from retrieval_attn.bench import suite
from retrieval_attn.cli import main

NAMES = ["needle", "ruler", "scbench", "ppl", "compare", "fidelity"]


def call(*words):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "suite", *map(str, words)])
    return leaving.value.code or 0


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
