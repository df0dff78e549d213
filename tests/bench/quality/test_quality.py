"""Runs of the quality benchmarks: rows, what is kept of them, and the commands."""

import json
from functools import partial

import pytest
from laws import rarely
from tiny_models import save_tiny_chat_model

import retrieval_attn as ra
from retrieval_attn.bench.methods.bench import Bench
from retrieval_attn.bench.methods.named import parse_method
from retrieval_attn.bench.quality import runner as quality_runner
from retrieval_attn.bench.quality.examples import Example, Turn
from retrieval_attn.bench.quality.format import cost_lines, render, score_table
from retrieval_attn.bench.quality.options import parse_tasks
from retrieval_attn.bench.quality.rows import ROW_FIELDS, SCORE_FIELDS
from retrieval_attn.bench.quality.runner import MODES, Kept, Planned, Runner, blank_row, collect, failed, whole
from retrieval_attn.cli import main

CONFIG = ra.RetrievalConfig(top_k=8, n_sink=4, n_local=16, followup="retrieve", exact_below=0)
SETTINGS = {"bench": "ruler", "seed": 0, "contexts": [300]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return ra.load(save_tiny_chat_model(tmp_path_factory.mktemp("model"), "llama"), dtype="float32")


@pytest.fixture(scope="module")
def no_template(tmp_path_factory):
    return str(save_tiny_chat_model(tmp_path_factory.mktemp("plain"), chat_template=None))


def example(number):
    turns = tuple(Turn(f"What is {x}?", (x,), "contains", 4, golden=x) for x in ("ab", "c", "d"))
    return Example("made", f"made-{number}", f"Text {number}. " * 40, turns, joint="\n\n")


def planned(modes=MODES, n=2):
    return [Planned("made", 300, f"made-{i}", mode, partial(example, i)) for i in range(n) for mode in modes]


def runner(llm, labels=("full", "scan"), **options):
    return Runner(Bench(llm, lambda weights: llm), [parse_method(x, CONFIG) for x in labels], "cpu", **options)


def scored(rows):
    return [{key: row[key] for key in SCORE_FIELDS} for row in rows]


def test_a_row_per_answer_with_every_field(llm):
    rows = list(runner(llm).rows(planned()))
    assert len(rows) == 2 * 2 * 2 * 3
    assert all(set(ROW_FIELDS) <= set(row) for row in rows)
    assert [row["turn"] for row in rows[:6]] == [1, 2, 3, 1, 2, 3]
    assert all(row["status"] == "ok" and 0 <= row["score"] <= 1 for row in rows)
    # Of the first of many turns all but the last token was read with the context.
    assert all((row["ttft_ms"] is None) == (row["mode"] == "multi-turn" and row["turn"] == 1) for row in rows)
    # In many turns the history grows; requests stand alone.
    turns = [row["prompt_tokens"] for row in rows if row["mode"] == "multi-turn" and row["method"] == "full"][:3]
    alone = [row["prompt_tokens"] for row in rows if row["mode"] == "multi-request" and row["method"] == "full"][:3]
    assert turns[0] == alone[0]
    assert turns[0] < turns[1] < turns[2]
    assert abs(alone[2] - alone[0]) < 3


def test_shared_and_own_prefill_give_the_same_scores(llm):
    plan = planned(("multi-request",), n=1)
    assert scored(runner(llm, share=False).rows(plan)) == scored(runner(llm).rows(plan))


def test_progress_ends_at_all_and_never_goes_back(llm):
    said = []
    list(runner(llm, on_advance=said.append).rows(planned()))
    shares = [step.share for step in said]
    assert shares == sorted(shares)
    assert 0.5 < shares[-1] <= 1.0


def test_a_method_that_fails_is_a_row_with_its_reason_and_the_others_go_on(llm, monkeypatch):
    def start(self, method, ids, read=None, on_progress=None):
        if method.name == "scan":
            raise MemoryError("16 GiB are wanted\nand more lines")
        return real(self, method, ids, read, on_progress)

    real = Bench.start
    monkeypatch.setattr(Bench, "start", start)
    rows = list(runner(llm).rows(planned(("multi-request",), n=1)))
    assert [(row["method"], row["status"]) for row in rows] == [("full", "ok")] * 3 + [("scan", "oom")]
    assert rows[-1]["reason"] == "16 GiB are wanted"
    assert rows[-1]["score"] is None


def test_what_cannot_be_made_is_a_row_of_every_method(llm):
    def make():
        raise ValueError("a context of 9 tokens is too short")

    rows = list(runner(llm).rows([Planned("made", 9, "x", "multi-turn", make)]))
    assert [row["reason"] for row in rows] == ["a context of 9 tokens is too short"] * 2


def test_bugs_are_not_rows(llm, monkeypatch):
    monkeypatch.setattr(quality_runner, "score", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(runner(llm).rows(planned(n=1)))


# Interrupted and taken up


@pytest.mark.parametrize("after", [1, 7, *rarely(2, 3, 20)])
def test_an_interrupted_run_is_taken_up_where_it_was(llm, tmp_path, after):
    out, plan = tmp_path / "r.json", planned()
    expected = scored(runner(llm).rows(plan))

    def interrupted(rows):
        for i, row in enumerate(rows):
            if i == after:
                raise KeyboardInterrupt
            yield row

    said = []
    with pytest.raises(KeyboardInterrupt):
        collect(interrupted(runner(llm).rows(plan)), Kept(out, SETTINGS, False), said.append)
    assert str(tmp_path / "r.json.part") in said[0]
    with pytest.raises(ValueError, match="--resume"):
        Kept(out, SETTINGS, False)
    kept = Kept(out, SETTINGS, True)
    # Only whole examples of a method are kept: later turns depend on earlier ones.
    assert len(kept.rows) == after // 3 * 3
    assert scored(kept.rows) == expected[: len(kept.rows)]
    rows = collect(runner(llm).rows(plan, kept.rows), kept, said.append)
    assert scored(rows) == expected
    kept.close()
    assert not (tmp_path / "r.json.part").exists()


def test_a_torn_line_is_done_again(tmp_path):
    kept = Kept(tmp_path / "r.json", SETTINGS, False)
    kept.add({"example": "a", "last": True})
    with kept.path.open("a") as file:
        file.write('{"example": "b", "la')
    assert Kept(tmp_path / "r.json", SETTINGS, True).rows == [{"example": "a", "last": True}]


def test_other_settings_are_refused_by_name_and_nothing_is_lost(tmp_path):
    kept = Kept(tmp_path / "r.json", SETTINGS, False)
    kept.add({"example": "a", "last": True})
    before = kept.path.read_bytes()
    with pytest.raises(ValueError, match="seed was 0 in .* and is 5 now"):
        Kept(tmp_path / "r.json", {**SETTINGS, "seed": 5}, True)
    assert kept.path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "no json\n", "[]\n", '{"rows": 1}\n'])
def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path, content):
    path = tmp_path / "r.json.part"
    path.write_text(content)
    with pytest.raises(ValueError, match="delete it to begin anew"):
        Kept(tmp_path / "r.json", SETTINGS, True)
    assert path.read_text() == content


def test_rows_that_went_before_say_nothing_without_their_last():
    rows = [{"n": 1, "last": False}, {"n": 2, "last": True}, {"n": 3, "last": False}]
    assert [row["n"] for row in whole(rows)] == [1, 2]


# Tables

ENV = {
    "cpu": "a",
    "cores": 1,
    "threads": 1,
    "omp_wait_policy": None,
    "isa": [],
    "packages": {},
    "load_average": None,
    "git": {"commit": None, "dirty": False},
    "date": "today",
}


def rows_of(scores):
    one = Planned("kv", 8192, "a", "multi-turn", lambda: None)
    rows = []
    for method, turns in scores.items():
        rows += [
            {
                **blank_row(one, method),
                "status": "ok",
                "turn": i + 1,
                "score": s,
                "refs": ["x"],
                "answer": "x",
                "tpot_ms": 2.0 + i,
                "rss_bytes": 1 << 20,
            }
            for i, s in enumerate(turns)
        ]
    return rows


def report_of(rows, bench="scbench"):
    return {"schema_version": 1, "bench": bench, "env": {}, "config": {}, "results": rows, "notes": ["a note"]}


def test_the_table_has_a_line_per_turn_and_a_column_per_method():
    rows = rows_of({"full": [1, 0.5], "scan": [1, 1]})
    rows.append(failed(Planned("kv", 8192, "a", "multi-turn", lambda: None), "graph", RuntimeError("no luck")))
    text = render(report_of(rows), "md", scores_only=True)
    assert "| 1 | 100.0 | 100.0 | failed | 0-1 |" in text
    assert "| 2 | 50.0 | 100.0 | failed | 0-1 |" in text
    assert "| all | 75.0 | 100.0 | failed | 0-2 |" in text
    assert "- graph: no luck" in text
    assert "ms" not in text.split("\n\n")[1]


def test_what_a_method_could_not_answer_shows_beside_its_mean():
    """One right answer of two, the other one out of memory: no better than a method that answered both."""
    rows = rows_of({"full": [1, 0]}) + rows_of({"scan": [1]})
    rows.append(failed(Planned("kv", 8192, "a", "multi-turn", lambda: None), "scan", MemoryError("no room"), turn=2))
    text = render(report_of(rows), "md", scores_only=True)
    assert "| all | 50.0 | 100.0 (1 of 2 out of memory) | 1-2 |" in text
    assert "no room" not in text
    assert "no room" in render({**report_of(rows), "env": ENV}, "md")


def test_costs_are_medians_and_peaks():
    lines = cost_lines(rows_of({"full": [1, 0, 1]}))
    assert lines[0]["tpot_ms"] == 3.0
    assert lines[0]["score"] == pytest.approx(200 / 3)
    assert cost_lines([]) == []


def test_a_needle_table_goes_by_depth():
    rows = [{**row, "depth": row["turn"] / 4, "turn": 1} for row in rows_of({"full": [1, 0]})]
    assert "| 0.25 | 100.0 |" in score_table(report_of(rows, "needle"))


@pytest.mark.parametrize("form", ["json", "csv"])
def test_scores_only_holds_nothing_that_differs(form):
    rows = rows_of({"full": [1]})
    slower = [{**row, "tpot_ms": 99.0, "rss_bytes": 5} for row in rows]
    one, other = (render({**report_of(r), "env": {"date": r[0]["tpot_ms"]}}, form, True) for r in (rows, slower))
    assert one == other
    assert render(report_of(rows), form) != render(report_of(slower), form)


# Commands


def call(capsys, *words):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", *words])
    said = capsys.readouterr()
    return leaving.value.code or 0, said.out, said.err


SMOKE = {
    "needle": ["--depths", "3", "--plain"],
    "ruler": ["-t", "niah_single_1,vt,fwe"],
    "scbench": ["-t", "many_shot,mix_passkey"],
    "compare": ["-t", "needle", "--method", "full,streaming,scan,scan:estimator=lift,offloaded"],
}


@pytest.mark.parametrize("bench", ["needle", *rarely("ruler", "scbench", "compare")])
def test_the_same_seed_gives_the_same_bytes(bench, capsys, tmp_path):
    words = [bench, "-c", "2k", "--limit", "1", *SMOKE[bench], "--scores-only"]
    if bench != "compare":
        words += ["--method", "full,graph,streaming"]
    outs = []
    for i in range(2):
        plot = ["--plot", str(tmp_path / f"{i}.png")] if i == 0 else []
        form = "json" if bench == "needle" else "md"
        status, out, _ = call(capsys, *words, "-o", form, "--out", str(tmp_path / f"{i}.json"), *plot)
        assert status == 0
        outs.append(out)
    assert outs[0] == outs[1]
    # The file has the times, too.
    report = json.loads((tmp_path / "0.json").read_text())
    assert report["env"]["packages"]
    assert (tmp_path / "0.png").stat().st_size > 10_000
    rows = report["results"]
    assert {row["status"] for row in rows} <= {"ok", "failed"}
    assert all(row["reason"] for row in rows if row["status"] != "ok")


def test_the_embedded_model_finds_a_needle_and_streaming_does_not(capsys):
    words = ["needle", "-c", "4k", "--depths", "1", "--plain", "--method", "full,scan,graph,streaming"]
    status, out, _ = call(capsys, *words, "-o", "json")
    rows = json.loads(out)["results"]
    right = {name: sum(row["score"] for row in rows if row["method"] == name) for name in ("full", "scan", "graph")}
    assert status == 0
    assert right == {"full": 1, "scan": 1, "graph": 1}
    assert sum(row["score"] for row in rows if row["method"] == "streaming") == 0


@pytest.mark.long
def test_needles_together_are_read_once_and_told_apart_by_depth(capsys):
    words = ["needle", "-c", "4k", "--depths", "5", "--together", "--plain", "--method", "full,scan", "-o", "json"]
    _, out, _ = call(capsys, *words)
    rows = json.loads(out)["results"]
    assert [row["depth"] for row in rows if row["method"] == "scan"] == [0, 0.25, 0.5, 0.75, 1]
    assert len({row["example"] for row in rows}) == len({row["read_ms"] for row in rows}) == 1
    assert sum(row["score"] for row in rows) >= 9


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["needle", "--method", "grph"], "unknown method 'grph'; did you mean graph?"),
        (["needle", "--method", ""], "--method names no method"),
        (["ruler", "-t", "niah_singel_1"], "unknown task 'niah_singel_1'; did you mean niah_single_1"),
        (["scbench", "-t", "kw"], "unknown task 'kw'; did you mean kv"),
        (["scbench", "--mode", "turns"], "--mode must be of multi-turn, multi-request"),
        (["compare", "-t", "kv,vt"], "--task must name one task"),
        (["ruler", "-t", "qa"], "--qa FILE go together"),
        (["ruler", "-t", "qa", "--qa", "missing.json"], "missing.json"),
        (["needle", "-c", "8q"], "--context must be tokens such as 8k"),
        (["needle", "--depths", "0"], "--depths must be at least 1"),
        (["needle", "--plot", "needle.pdf"], "--plot must end in"),
        (["needle", "--plot", "missing/needle.png"], "--plot must lie in a folder that exists"),
        (["needle", "--out", "missing/needle.json"], "--out must lie in a folder that exists"),
        (["needle", "--resume"], "--resume goes on with what lies beside --out"),
        (["needle", "--text", "missing.txt"], "missing.txt"),
        (["scbench", "--data", "missing.jsonl", "-t", "kv"], "missing.jsonl"),
        (["needle", "--model", "missing/model"], "missing/model"),
        (["needle", "--followup", "some"], "followup must be one of 'exact', 'retrieve', got 'some'"),
        (["needle", "-o", "xml"], "--output must be one of md, json, csv"),
        (["needle", "-c", "2m"], "longer than the model"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *words)
    assert status == 2
    assert says in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_template_is_asked_in_plain_text(no_template, capsys):
    status, out, _ = call(
        capsys,
        "scbench",
        "-m",
        no_template,
        "-c",
        "600",
        "-t",
        "mf",
        "--limit",
        "1",
        "--method",
        "full,exact",
        "--scores-only",
    )
    assert status == 0
    assert "| mf" in out or "| multi" in out


def test_groups_of_tasks_and_single_ones():
    assert parse_tasks("b,all,b", ["a", "b"], {"all": ["a", "b"]}) == ["b", "a"]
    with pytest.raises(ValueError, match="names no task"):
        parse_tasks(" ,", ["a"], {})


@pytest.mark.long
def test_limit_is_examples_of_each_task_and_length(capsys):
    _, out, _ = call(
        capsys,
        "ruler",
        "-c",
        "1k,2k",
        "--limit",
        "2",
        "-t",
        "niah_single_1,fwe",
        "--samples",
        "50",
        "--method",
        "full",
        "-o",
        "json",
    )
    assert len(json.loads(out)["results"]) == 2 * 2 * 2
