"""The page of results and the README's tables: every number is there, nothing of a report can break them."""

import base64
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import typer
from markupsafe import escape
from typer.testing import CliRunner

from retrieval_attn.bench.quality.scores import ends, score, score_lines
from retrieval_attn.bench.report import command as report
from retrieval_attn.bench.report.read import KINDS, ReportFile, read_folder, read_report
from retrieval_attn.bench.report.readme import LATENCY_FILE, RECALL_FILE
from retrieval_attn.bench.report.tables import LONGEST_TEXT, cell, tables
from retrieval_attn.bench.shared import pictures
from retrieval_attn.bench.shared.report import results_folder

EVIL = '<script>alert(1)</script> & "a" $x_1$ | <!-- end -->'
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENV = {
    "date": "2026-11-21T00:05:49+00:00",
    "git": {"commit": COMMIT, "dirty": True},
    "cpu": "Some CPU",
    "cores": 2,
    "threads": 2,
    "packages": {"torch": "2.13.0", "triton": None},
    "gpu": None,
    "gpu_driver": None,
}
README = """# Title\r
<!-- bench report: latency -->
what stood here
<!-- end -->
 between\t
<!-- bench report: recall -->
<!-- end --> <!-- bench report: quality --><!-- end -->
<!-- bench report: perplexity --><!-- end -->
the end"""


def latency_rows():
    times = {"full": (22.918, 375.606), "folded": (2.928, 45.363), "exact": (2.389, 11.388), "graph": (3.386, 7.69)}
    return [
        {
            "context": context,
            "method": method,
            "status": "ok",
            "reason": None,
            "total_ms": ms,
            "total_p20_ms": 0.9 * ms,
            "total_p80_ms": 1.1 * ms,
            "rel_error": 0.0123,
            "visited_pct": 1.25,
            "index_bytes": 3 << 20,
        }
        for method, both in times.items()
        for context, ms in zip((8192, 131072), both, strict=True)
    ] + [{"context": 131072, "method": "scan", "status": "oom", "reason": EVIL}]


def recall_rows():
    def row(method, effort, recall, us):
        return {
            "source": "shaped",
            "context": 131072,
            "seed": 31,
            "method": method,
            "effort": effort,
            "status": "ok",
            "reason": None,
            "recall": recall,
            "search_us": us,
            "visited_pct": 12.0,
            "bytes_read": 2.0**25,
            "build_s": 57.3,
            "index_bytes": 0 if method == "exact" else 100,
            "index_pct": 24.69,
        }

    slow = [row("hnsw", effort, recall, 9e4) for effort, recall in ((100, 0.4), (200, 0.62))]
    exact = row("exact", None, 1.0, 11477.0)
    return [*slow, row("ivf", 1, 0.5, 500.0), exact, row("graph", 200, 1.0, 8000.0), row("graph", 100, 0.9, 2000.0)]


def answer(task="needle", method="graph", **changes):
    return {
        "task": task,
        "context": 32768,
        "example": "32768-0",
        "method": method,
        "mode": "multi-request",
        "turn": 1,
        "depth": 0.25,
        "prompt_tokens": 32741,
        "answer": "7654321",
        "refs": ["7654321"],
        "score": 1.0,
        "status": "ok",
        "reason": "",
        "ttft_ms": 19397.9,
        "read_ms": 16384.0,
        "build_ms": None,
        "tpot_ms": 6.54,
        "visited_pct": 3.21,
        "kv_bytes": 50 << 20,
        "device_kv_bytes": None,
        "index_bytes": None,
        "rss_bytes": None,
        "peak_device_bytes": None,
        **changes,
    }


def failed(**changes):
    return answer(
        **{
            "status": "failed",
            "reason": EVIL,
            "answer": None,
            "score": None,
            "ttft_ms": None,
            "tpot_ms": None,
            **changes,
        }
    )


def needle_rows():
    good = [answer(context=n, depth=d, score=s) for n, d, s in ((32768, 0, 1.0), (32768, 1, 0.0), (65536, 0.5, 1.0))]
    return [*good, answer(answer=EVIL), failed(), *(answer(method=EVIL, score=1 / 3) for _ in range(2))]


def scbench_rows():
    return [
        answer(task, mode=mode, turn=turn, score=turn / 10)
        for task in ("kv", "vt")
        for mode in ("multi-request", "multi-turn")
        for turn in (3, 1, 2)
    ]


def memory_rows():
    peaks = {
        name: {"host": (100 + i) << 20, "device": 0}
        for i, name in enumerate(("load", "prefill", "build", "decode", "save", "restore"))
    }
    good = {
        "context": "8k",
        "index": "scan",
        "status": "ok",
        "reason": "",
        "tokens": 8190,
        "planned": peaks,
        "measured": peaks,
        "ttft_s": 4.56,
        "answers": 3,
        "answers_right": 3,
    }
    return [good, {"context": "1m", "index": "scan", "status": "failed", "reason": "no room"}]


def head_rows():
    return [
        {
            "context": 32768,
            "method": "scan",
            "layer": layer,
            "head": head,
            "error": 0.01 * (1 + layer + 2 * head),
            "mass": 0.975,
            "recall": 0.9,
            "planted": None,
            "status": "ok",
            "reason": "",
        }
        for layer in range(2)
        for head in range(3)
    ]


def ppl_rows():
    good = {
        "context": 8192,
        "method": "full",
        "tokens": 2048,
        "ppl": 8.8765,
        "agreement": 1.0,
        "kl": 0.0,
        "tpot_ms": 45.5,
        "visited_pct": None,
        "status": "ok",
        "reason": "",
    }
    return [
        good,
        {**good, "context": 16384, "ppl": 8.1234},
        {**good, "method": "graph", "ppl": 8.9, "agreement": 0.97, "kl": 0.00123},
        {**good, "method": "scan", "ppl": None, "status": "failed"},
    ]


def kernel_rows():
    return [
        {
            "part": "prefill",
            "context": n,
            "method": "auto",
            "status": "ok",
            "reason": None,
            "total_ms": n / 7,
            "speedup_vs_sdpa": 1.86,
            "rel_error": 0.0123,
        }
        for n in (16384, 32768)
    ]


def make_rows():
    """Rows of every kind."""
    compare = [answer("vt", "full", tpot_ms=45.5, score=0.8), answer("vt", score=0.7), answer("vt", score=0.7)]
    long = [{"new_tokens": 2002, "tokens_per_s": 116.55}, {"new_tokens": 4002, "tokens_per_s": 113.17}]
    return {
        "latency": latency_rows(),
        "recall": recall_rows(),
        "compare": compare,
        "needle": needle_rows(),
        "ruler": [answer("cwe", context=n, score=0.123) for n in (32768, 65536)],
        "scbench": scbench_rows(),
        "ppl": ppl_rows(),
        "fidelity": head_rows(),
        "memory": memory_rows(),
        "long": long,
        "kernels": kernel_rows(),
    }


NAMES = {"latency": LATENCY_FILE, "recall": RECALL_FILE}


def write(path, rows, kind=None, **changes):
    whole = (
        {"schema_version": 1, "env": ENV, "config": {"index": "scan", "said": EVIL}, "results": rows, "notes": [EVIL]}
        | ({"bench": kind} if kind else {})
        | changes
    )
    path.write_text(json.dumps(whole))
    return path


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for kind, rows in make_rows().items():
        write(folder / NAMES.get(kind, f"{kind}-made.json"), rows)
    return folder


def call(*words):
    app = typer.Typer()
    app.command()(report.command)
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, and the page of it written twice."""
    folder = tmp_path_factory.mktemp("all") / "results"
    folder.mkdir()
    for kind, rows in make_rows().items():
        write(folder / NAMES.get(kind, f"{kind}-made.json"), rows, kind)
    (folder / "speed-of-light.json").write_text('{"schema_version": 1}')
    pages = []
    for name in ("a.html", "b.html"):
        done = call("--results", folder, "-o", folder.parent / name)
        assert done.exit_code == 0
        pages.append((folder.parent / name).read_bytes())
    return folder, pages, done.stderr


class Seen(HTMLParser):
    """What a browser makes of a page: tags, texts, what is fetched, and tables as rows of cells."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.links, self.ids, self.images = set(), [], [], [], []
        self.tables, self._in_cell = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        self.links += [found[name] for name in ("src", "href", "data", "srcset") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        self.images += [found] if tag == "img" else []
        self._in_cell = tag in ("th", "td")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self._in_cell:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def drawn(uri):
    """The text of a picture that an address holds."""
    return base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()


def test_a_page_is_the_same_on_every_run(made):
    _, (first, second), _ = made
    assert first == second


def test_every_kind_has_a_section_and_a_picture_that_says_what_it_is(made):
    seen = Seen(made[1][0].decode())
    assert set(KINDS) <= set(seen.ids)
    assert len(seen.images) == len(KINDS)
    assert all(image["alt"] for image in seen.images)
    assert all(ElementTree.fromstring(drawn(image["src"])).tag.endswith("svg") for image in seen.images)
    # What the contents refer to is in the page, once.
    assert len(seen.ids) == len(set(seen.ids))
    assert {to for to in seen.links if not to.startswith("data:")} <= {f"#{name}" for name in seen.ids}


def test_every_number_of_a_table_is_on_the_page(made):
    folder, (page, _), _ = made
    text = html.unescape(page.decode())
    expected = [
        [[heading for heading, *_ in table.used], *([cell(row, column) for column in table.used] for row in table.rows)]
        for one in read_folder(folder).reports
        for table in tables(one)
    ]
    assert Seen(page.decode()).tables == expected
    for number in (
        "375.606",
        "413.167",
        "1.2e-02",  # latency: a median, its p80, an error
        "0.6200",
        "90,000",
        "11.477",
        "4.000",
        "never gets there",  # recall: at 0.95, halfway in the logarithm of time
        "45.50",
        "80.0",
        "70.0",
        "100.0",
        "33.3",
        "12.3",
        "19,397.9",
        "50.0",  # scores and costs
        "8.877",
        "8.123",
        "0.0350",
        "0.0600",
        "0.9750",
        "4.56",
        "105.0",
        "116.5",
        "4,681.143",
        "1.86",
    ):
        assert f">{number}<" in text, number


def test_every_report_names_machine_versions_and_commit(made):
    folder, (page, _), _ = made
    text = " ".join(Seen(page.decode()).texts)
    assert text.count(f"commit {COMMIT[:12]}, changed files;") == len(KINDS)
    assert COMMIT not in text
    for said in ("Some CPU, 2 cores, 2 threads;", "no GPU;", "torch 2.13.0;", ENV["date"]):
        assert text.count(said) == len(KINDS)
    assert all(path.name in text for path in folder.glob("*.json"))


def test_text_of_a_report_stays_text(made):
    page = made[1][0].decode()
    seen = Seen(page)
    assert "script" not in seen.tags
    assert str(escape(EVIL)) in page
    # In every report as a setting and a note; as an answer, a reason, a method, and the title of a panel.
    assert sum(EVIL in text for text in seen.texts) >= 2 * len(KINDS) + 4
    assert EVIL not in page


def test_text_of_a_picture_is_no_formula_and_no_markup(made):
    every = [drawn(image["src"]) for image in Seen(made[1][0].decode()).images]
    # The title of a panel.
    assert any(html.escape(EVIL, quote=False) in svg for svg in every)
    assert not any("<script" in svg for svg in every)


def test_nothing_is_fetched(made):
    page = made[1][0].decode()
    seen = Seen(page)
    assert not seen.tags & {"link", "script", "iframe", "object", "embed", "image", "svg"}
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in seen.images)
    for text in (page, *(drawn(image["src"]) for image in seen.images)):
        assert "@import" not in text
        assert "url(" not in text.replace("url(#", "")
        # Names of namespaces are no addresses.
        assert not re.search(r"(?:href|src)\s*=\s*[\"']?http", text)
    assert "http" not in page


def test_a_file_that_is_no_report_is_named_and_skipped(made):
    _, (page, _), stderr = made
    reason = "bench must be one of latency, recall"
    assert stderr.startswith(f"skipped speed-of-light.json: {reason}")
    assert len(stderr.splitlines()) == 1
    assert f"<li><code>speed-of-light.json</code>: {reason}" in page.decode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "must hold an object"),
        ("[" * 100_000, "not JSON"),
        ('{"schema_version": 2}', "schema_version must be 1, got 2"),
        ('{"schema_version": 1, "bench": ["ppl"]}', "bench must be one of"),
        ('{"schema_version": 1, "env": {}, "config": {}}', "'results' must be a list"),
        ('{"schema_version": 1, "env": {"git": "x"}, "config": {}, "results": []}', "env.git must be an object"),
    ],
)
def test_what_cannot_be_a_report(tmp_path, content, reason):
    (tmp_path / "ppl-x.json").write_text(content)
    ((name, said),) = read_folder(tmp_path).skipped
    assert name == "ppl-x.json"
    assert reason in said


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("needle", 7, "row 1: must be an object"),
        ("needle", answer(score=None), "row 1: 'score' must be a number, got None"),
        ("needle", answer(score=float("nan")), "'score' must be a number, got nan"),
        ("needle", answer(tpot_ms="6"), "'tpot_ms' must be a number or null, got '6'"),
        ("needle", answer(mode=["a"]), "'mode' must be text"),
        ("needle", {"method": "scan", "status": "ok"}, "'task' must be text, got None"),
        ("memory", {"context": "8k", "index": "scan", "status": "ok"}, "'planned' and 'measured' must give"),
    ],
)
def test_a_row_that_cannot_be_shown_is_named(tmp_path, kind, row, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_report(write(tmp_path / "x.json", [row], kind))


def test_the_kept_results_are_all_reports():
    found = read_folder(results_folder())
    assert not found.skipped
    assert {LATENCY_FILE, RECALL_FILE} <= {one.name for one in found.reports}


def test_empty_and_failed_reports_are_shown(tmp_path):
    for kind in KINDS:
        write(tmp_path / f"{kind}-empty.json", [])
    write(tmp_path / "needle-lost.json", [failed(), failed(status="oom", method="full")])
    assert call("--results", tmp_path, "-o", tmp_path / "a.html").exit_code == 0
    page = (tmp_path / "a.html").read_text()
    assert page.count("<p>No rows.</p>") == len(KINDS)
    assert ">out of memory<" in page


def test_scores_count_what_is_missing():
    rows = [answer(score=1.0), answer(score=0.5), failed(), failed(status="oom"), failed(status="oom")]
    assert str(score(rows)) == "75.0 (3 of 5 out of memory)"
    assert str(score(rows[2:3])) == "failed"
    assert str(score(rows[:2])) == "75.0"


def test_of_many_turns_the_first_and_the_last_are_kept():
    lines = ends(score_lines(scbench_rows(), by_turn=True))
    assert [(line.task, line.mode, line.turn) for line in lines[:4]] == [
        ("kv", "multi-request", 1),
        ("kv", "multi-request", 3),
        ("kv", "multi-turn", 1),
        ("kv", "multi-turn", 3),
    ]
    assert len(lines) == 8
    (line,) = ends(score_lines([answer(), answer()], by_turn=True))
    assert line.answers == "2"


def test_a_lost_example_is_missing_in_each_of_its_turns():
    rows = [*(answer(turn=turn) for turn in (1, 2)), failed(turn=None)]
    lines = score_lines(rows, by_turn=True)
    assert [(line.turn, str(line.scores["graph"])) for line in lines] == [
        (turn, "100.0 (1 of 2 failed)") for turn in (1, 2)
    ]
    (line,) = score_lines(rows, by_turn=False)
    assert str(line.scores["graph"]) == "100.0 (2 of 4 failed)"
    (line,) = score_lines(rows[2:], by_turn=True)
    assert (line.turn, str(line.scores["graph"])) == (None, "failed")


def test_long_answers_are_cut(tmp_path):
    path = write(tmp_path / "x.json", [answer(answer="x" * 10_000)], "needle")
    (table,) = [table for table in tables(read_report(path)) if table.folded]
    assert cell(table.rows[0], ("", "answer", "{}")) == "x" * LONGEST_TEXT + "…"


def test_blocks_are_written_and_the_rest_is_left_to_the_byte(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_bytes(README.encode())
    assert call("--results", results, "--readme", readme).exit_code == 0
    written = readme.read_bytes().decode()
    assert re.sub(r"(-->)(?:(?!<!--).)*(<!-- end)", r"\1\2", written, flags=re.DOTALL) == README.replace(
        "\nwhat stood here\n", ""
    ).replace("-->\n<!-- end -->", "--><!-- end -->")
    assert call("--results", results, "--readme", readme).exit_code == 0
    assert readme.read_bytes().decode() == written


def test_what_the_blocks_say(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_bytes(README.encode())
    call("--results", results, "--readme", readme)
    lines = readme.read_text().splitlines()
    assert "| 8K | 22.9 | 2.9 | 2.4 (1.2 %) | 3.4 (1.2 %) | - |" in lines
    assert "| 128K | 376 | 45.4 | 11.4 (1.2 %) | 7.7 (1.2 %) | oom |" in lines
    assert f"From [{LATENCY_FILE}](results/{LATENCY_FILE}) (commit {COMMIT[:12]}, changed files)." in lines
    # Halfway between two efforts in the logarithm of time; fastest first; what never gets there last.
    start = next(i for i, line in enumerate(lines) if line.startswith("| `graph` | 4.0 | 12 %, after comparing"))
    assert lines[start].endswith(" | 57 | 24.7 % |")
    assert lines[start + 1 : start + 4] == [
        "| `exact` (recall 1) | 11.5 | 12 % | - | - |",
        "| faiss HNSW (recall 0.62 at most) | - | - | 57 | 24.7 % |",
        "| `ivf` (recall 0.5 at most) | - | - | 57 | 24.7 % |",
    ]
    kv = [line for line in lines if line.startswith("| [scbench](results/scbench-made.json) | kv | 32K |")]
    assert [line.split(" | ")[3:5] for line in kv] == [
        [f"multi-{mode}, turn {turn}", "1"] for mode in ("request", "turn") for turn in (1, 3)
    ]
    evil = html.escape(EVIL, quote=False).replace("|", "\\|")
    (heads,) = [line for line in lines if "mode and turn" in line]
    assert heads == f"|  | task | context | mode and turn | answers | `graph` | `{evil}` |"
    needle = "| [needle](results/needle-made.json) | needle | 32K |  | 2-3 | 66.7 (1 of 4 failed) | 33.3 |"
    assert needle in lines
    assert any(line.startswith("From [needle-made.json](results/needle-made.json) (commit 0123") for line in lines)
    assert "| model | text | context | `full` | `graph` |" in lines
    assert "| embedded | prose | 8K | 8.88 | 8.90 (0.0012, 97 %) |" in lines
    assert "| embedded | prose | 16K | 8.12 | - |" in lines


def test_without_reports_the_quality_block_says_so(tmp_path):
    (tmp_path / "README.md").write_text("<!-- bench report: quality --><!-- end -->")
    assert call("--results", tmp_path, "--readme", tmp_path / "README.md").exit_code == 0
    assert "\nNo report of needle, ruler, scbench yet.\n" in (tmp_path / "README.md").read_text()


def test_check_changes_nothing_and_says_by_its_status_what_would_change(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_bytes(README.encode())
    words = ("--results", results, "--readme", readme)
    done = call(*words, "--check")
    assert done.exit_code == 1
    assert "not up to date" in done.stderr
    assert readme.read_bytes().decode() == README
    call(*words)
    assert call(*words, "--check").exit_code == 0
    rows = [{**row, "total_ms": 2 * row["total_ms"]} if "total_ms" in row else row for row in latency_rows()]
    write(results / LATENCY_FILE, rows)
    assert call(*words, "--check").exit_code == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- bench report: speed -->\n<!-- end -->",
            r"must be one of latency, .*, perplexity, got 'speed'",
        ),
        ("<!-- bench report: latency -->\n", r"block 'latency' of the README must end with <!-- end -->"),
        ("<!-- bench report: latency -->\n<!-- bench report: recall --><!-- end -->", r"block 'latency' .* must end"),
        ("no block", r"has no block; write <!-- bench report: NAME --> and .* one of latency, recall, quality"),
        ("<!-- bench report: latency --><!-- end -->", r"block 'latency' needs latency-llama3.* not there"),
        (b"\xff<!-- bench report: latency --><!-- end -->", r"--readme must be UTF-8"),
    ],
)
def test_a_readme_that_cannot_be_written_is_left_alone(tmp_path, text, message):
    readme = tmp_path / "README.md"
    before = text if isinstance(text, bytes) else text.encode()
    readme.write_bytes(before)
    with pytest.raises(ValueError, match=message) as caught:
        call("--results", tmp_path, "--readme", readme, "-o", tmp_path / "a.html")
    assert "\n" not in str(caught.value)
    assert readme.read_bytes() == before
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to write"),
        (["--check", "-o", "a.html"], "--check compares a README"),
        (["--results", "/nowhere", "-o", "a.html"], "--results must be a folder that exists"),
        (["-o", "/nowhere/a.html"], "--out must lie in a folder that exists"),
        (["-o", "a.txt"], "--out must end in .html"),
        (["--readme", "/nowhere/README.md"], "--readme must be a file that exists"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(*words)
    assert not [*tmp_path.iterdir()]


def test_without_matplotlib_the_page_has_its_tables_and_says_what_to_install(results, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("--results", results, "-o", results / "a.html")
    assert (done.exit_code, done.stderr) == (0, "pictures need matplotlib; pip install 'retrieval-attn[plot]'\n")
    seen = Seen((results / "a.html").read_text())
    assert not seen.images
    assert "Pictures need matplotlib; pip install 'retrieval-attn[plot]'." in seen.texts
    assert "375.606" in seen.texts


def test_an_installed_package_reads_the_current_folder(monkeypatch, tmp_path):
    write(tmp_path / "ppl-mine.json", ppl_rows())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("retrieval_attn.bench.shared.report.__file__", str(tmp_path / "bench/shared/report.py"))
    assert results_folder().resolve() == tmp_path
    assert call("-o", "a.html").exit_code == 0
    assert "ppl-mine.json" in (tmp_path / "a.html").read_text()


def test_methods_look_different_and_the_known_ones_alike_everywhere():
    looks = pictures.styles(["full", "graph", "x", "y", "full", *"abcdefgh"])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(looks) == 12
    assert pictures.styles(["z", "graph"])["graph"] == looks["graph"]
    # "sdpa" has the place of "full", and another where both are.
    assert pictures.styles(["sdpa"])["sdpa"] == looks["full"] != pictures.styles(["full", "sdpa"])["sdpa"]


def test_a_picture_depends_on_its_data_alone(tmp_path):
    import matplotlib

    def draw():
        return pictures.lines_of(latency_rows()[:-1], "total_ms", "ms")

    before = pictures.as_uri(draw)
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "another"}):
        settings = dict(matplotlib.rcParams)
        assert pictures.as_uri(draw) == before
        assert dict(matplotlib.rcParams) == settings
    assert pictures.as_uri(lambda: None) is None
    # A picture of its own says what it is of, and that there was nothing to draw.
    for name, figure in (("a.svg", draw), ("b.svg", lambda: None)):
        pictures.save(figure, "Title $x_1$", tmp_path / name)
        assert "Title $x_1$" in (tmp_path / name).read_text()


def test_reports_come_in_the_order_of_the_page(made):
    reports = read_folder(made[0]).reports
    assert all(isinstance(one, ReportFile) for one in reports)
    assert [one.kind for one in reports] == [*KINDS]
