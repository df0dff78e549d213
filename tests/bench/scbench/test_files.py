"""SCBench's published files: what is made of their rows, and what is said of rows that are not theirs."""

import json

import pytest

from retrieval_attn import load
from retrieval_attn.bench.quality.examples import Prompts
from retrieval_attn.bench.quality.scoring import score
from retrieval_attn.bench.scbench.files import TASKS, read_scbench, truncate_middle
from retrieval_attn.bench.scbench.tasks import scbench_maker

OPTIONS = ["Ann", "Bob", "Cid", "Dan"]
NUMBERS = "You should answer with only one number, no other words. The {} number of the list is: "
ROWS = {
    "kv": ('JSON data:\n{"k": "v"}', [("\nKey: k", "v"), ("\nKey: l", "w")]),
    "prefix_suffix": ("dict = ['ab']", [("Prefix: a; Suffix: b.", "ab")]),
    "vt": ("VAR X = 1", [("Question: Find all.", ["X", "Y"]), ("Question: Find more.", ["Z"])]),
    "mf": ([3, 1, 2], [(NUMBERS.format("largest"), 3), (NUMBERS.format("second smallest"), 2)]),
    "many_shot": ("Q\n(A)", [("Q2\n", "(B)")]),
    "passkey": ("Grass. 12345.", [("What is the pass key?", "12345")]),
    "choice_eng": ("A book.", [("Who?", "Cid", {"options": OPTIONS}), ("And who?", "Ann", {"options": OPTIONS})]),
    "qa_eng": ("A book.", [("Who?", "Cid")]),
    "qa_chn": ("书。", [("谁？", "他")]),  # noqa: RUF001
    "summary_with_needles": (
        "Text.",
        [("Sum up.", "It is.", {"task": "scbench_summary"}), ("Key?", "123", {"task": "scbench_passkey"})],
    ),
    "repoqa_and_kv": (
        "Code.",
        [("\nKey: k", "v", {"task": "scbench_kv"}), ("Find f.", "def f", {"task": "scbench_repoqa"})],
    ),
}

# Context and first question, as in the harness's templates; and the second question, where it is asked.
PROMPTS = {
    "kv": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"k": "v"}\n\n\nKey: k',
        "\nKey: l",
    ),
    "prefix_suffix": ("dict = ['ab']\n\nPrefix: a; Suffix: b.",),
    "vt": ("VAR X = 1\n\nQuestion: Find all.", "Question: Find more."),
    "mf": (
        f"What is the largest number of the list?\n\n[3, 1, 2]\n\n{NUMBERS.format('largest')}",
        f"What is the second smallest number of the list?\n\n{NUMBERS.format('second smallest')}",
    ),
    "many_shot": ("Q\n(A)\n\nQ2\n",),
    "passkey": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\nGrass. 12345.\n\nWhat is the pass key?",
    ),
    "choice_eng": (
        "Read the book and answer the question.\n\nA book.\n\nQuestion: Who?\nA. Ann\nB. Bob\nC. Cid\nD. Dan\n\n"
        "The the correct answer is",
        "Question: And who?\nA. Ann\nB. Bob\nC. Cid\nD. Dan\n\nThe the correct answer is",
    ),
    "qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\nA book.\n\nQuestion: Who?\nAnswer:",
    ),
    "qa_chn": ("阅读以下书籍然后回答问题。\n\n书。\n\n问题：谁？\n答案：",),  # noqa: RUF001
    "summary_with_needles": ("Text.\n\nKey?",),
    "repoqa_and_kv": ("Code.\n\n\nKey: k",),
}
BUDGETS = {
    "kv": 150,
    "prefix_suffix": 150,
    "vt": 30,
    "mf": 5,
    "many_shot": 10,
    "passkey": 15,
    "choice_eng": 40,
    "qa_eng": 40,
    "qa_chn": 40,
    "summary_with_needles": 15,
    "repoqa_and_kv": 80,
}


def row(task):
    context, turns = ROWS[task]
    asked = [{"input": turn[0], "answer": turn[1], **(turn[2] if len(turn) > 2 else {})} for turn in turns]
    return {"id": 7, "context": context, "multi_turns": asked}


@pytest.fixture
def written(tmp_path):
    def write(rows, name="scbench_kv.jsonl"):
        path = tmp_path / name
        lines = [one if isinstance(one, bytes) else json.dumps(one, ensure_ascii=False).encode() for one in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_those_of_the_harness(written, task):
    (example,) = read_scbench(written([row(task)], f"scbench_{task}.jsonl"))
    first, *later = PROMPTS[task]
    assert (example.task, example.id, example.joint) == (task, "0", "\n\n")
    assert example.context + example.joint + example.turns[0].ask == first
    assert [turn.ask for turn in example.turns[1:]] == later
    assert {turn.max_new_tokens for turn in example.turns} == {BUDGETS[task]}


RIGHT = {
    "kv": ("it is v", "V"),
    "prefix_suffix": ("ab", "a b"),
    "vt": ("x and y", "none"),
    "mf": ("3.", "13"),
    "many_shot": ("(b)", "B"),
    "passkey": ("12345.", "12346"),
    "choice_eng": ("The answer is C", "B"),
    "qa_eng": ("It was CID", "Ann"),
    "qa_chn": ("「他」", "她"),
    "summary_with_needles": ("123", "1234"),
    "repoqa_and_kv": ("v", "w"),
}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_judged_as_in_the_harness(written, task):
    turn = read_scbench(written([row(task)]), task)[0].turns[0]
    right, wrong = RIGHT[task]
    assert score(turn.scorer, right, turn.refs) == 1
    assert score(turn.scorer, wrong, turn.refs) == 0
    assert score(turn.scorer, turn.golden, turn.refs) == 1


def test_golden_answers_are_told_as_in_the_harness(written):
    golden = {task: read_scbench(written([row(task)]), task)[0].turns[0].golden for task in TASKS}
    assert (golden["vt"], golden["mf"], golden["choice_eng"], golden["kv"]) == ("['X', 'Y']", "3", "Cid", "v")


@pytest.mark.parametrize(
    ("name", "task"),
    [("scbench_vt.jsonl", None), ("multi_turn_vt.jsonl", None), ("vt.jsonl", None), ("x", "vt"), ("x", "scbench_vt")],
)
def test_the_task_is_told_or_the_file_names_it(written, name, task):
    assert read_scbench(written([row("vt")], name), task)[0].task == "vt"


def test_published_rows_are_read_in_order_and_blank_lines_passed_over(written):
    rows = [{**row("kv"), "context": f"text {i}"} for i in range(3)]
    path = written([b"\xef\xbb\xbf" + json.dumps(rows[0]).encode(), b"", rows[1], b"  ", rows[2]])
    made = read_scbench(path)
    assert [example.id for example in made] == ["0", "1", "2"]
    assert [example.context.split("\n\n")[1] for example in made] == ["text 0", "text 1", "text 2"]


def test_a_context_may_be_called_input(written):
    changed = row("vt")
    changed["input"] = changed.pop("context")
    assert read_scbench(written([changed]), "vt") == read_scbench(written([row("vt")]), "vt")


def test_five_turns_are_read_as_in_the_harness_or_all(written):
    long = {**row("kv"), "multi_turns": [{"input": f"Key: {i}", "answer": str(i)} for i in range(8)]}
    path = written([long])
    assert [len(read_scbench(path, most_turns=most)[0].turns) for most in (5, 1, None)] == [5, 1, 8]
    assert len(read_scbench(path)[0].turns) == 5


def test_rows_of_mixed_tasks_without_a_turn_to_ask_are_left_out(written):
    mixed, other = row("repoqa_and_kv"), row("repoqa_and_kv")
    other["multi_turns"] = other["multi_turns"][1:]
    assert [example.id for example in read_scbench(written([other, mixed]), "repoqa_and_kv")] == ["1"]
    with pytest.raises(ValueError, match="holds no row with a turn of repoqa_and_kv"):
        read_scbench(written([other]), "repoqa_and_kv")


def turned(kind, /, **fields):
    """A row whose last turn has other fields; None takes one away."""
    made = row(kind)
    turn = made["multi_turns"][-1]
    turn.update(fields)
    made["multi_turns"][-1] = {key: value for key, value in turn.items() if value is not None}
    return made


KV, MULTI = row("kv"), "multi_turns must be a list of at least one object with input and answer, got "
WRONG = [
    ("kv", b"{'id': 1}", "not JSON at column 2 (Expecting property name enclosed in double quotes); give one"),
    ("kv", b'{"id": 1', "not JSON at column 9"),
    ("kv", b'{"context": "\xff"}', "not UTF-8 at byte 14; give JSON lines in UTF-8"),
    ("kv", [KV], "a row must be an object with context and multi_turns, got a list"),
    ("kv", {**KV, "context": ""}, "context (or input) must be a text or a list of numbers, got an empty one"),
    ("kv", {**KV, "context": {}}, "context (or input) must be a text or a list of numbers, got an object"),
    ("kv", {"multi_turns": KV["multi_turns"]}, "context (or input) must be a text or a list of numbers, got none"),
    ("kv", {"context": "text"}, MULTI + "none"),
    ("kv", {**KV, "multi_turns": []}, MULTI + "an empty one"),
    ("kv", {**KV, "multi_turns": {}}, MULTI + "an object"),
    ("kv", {**KV, "multi_turns": ["x"]}, "turn 1 must be an object with input and answer, got a text"),
    ("kv", turned("kv", input=None), "turn 2: input must be a text, got none"),
    ("kv", turned("kv", input=5), "turn 2: input must be a text, got a number"),
    ("kv", turned("kv", answer=None), "turn 2: answer must be a text or a list of texts, got none"),
    ("kv", turned("kv", answer=5), "turn 2: answer must be a text or a list of texts, got a number"),
    ("kv", turned("kv", answer=""), "turn 2: answer must be a text or a list of texts, got an empty one"),
    ("kv", turned("kv", answer=[]), "turn 2: answer must be a text or a list of texts, got an empty one"),
    ("vt", turned("vt", answer=["X", 3]), "turn 2: answer must be a text or a list of texts, got a list with a number"),
    ("mf", turned("mf", answer="3"), "turn 2: answer must be a number or a list of numbers, got a text"),
    ("mf", turned("mf", answer=True), "turn 2: answer must be a number or a list of numbers, got true or false"),
    ("mf", turned("mf", input="How many?"), 'turn 2: input must end in "The ... is", of which the question is made'),
    ("choice_eng", turned("choice_eng", options=None), "turn 2: options must be a list of 4 texts, got none"),
    ("choice_eng", turned("choice_eng", options=["x"]), "turn 2: options must be a list of 4 texts, got a list of 1"),
    ("choice_eng", turned("choice_eng", answer="Eve"), "turn 2: answer must be one of the options, got 'Eve'"),
    ("repoqa_and_kv", turned("repoqa_and_kv", task=None), "turn 2: task must be a text, got none"),
]


@pytest.mark.parametrize(("task", "wrong", "said"), WRONG)
def test_what_is_wrong_is_told_in_a_line_with_its_number(written, task, wrong, said):
    path = written([row(task), b"", wrong, row(task)])
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read_scbench(path, task)
    assert str(raised.value).startswith(f"{path}, line 3: {said}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [
        ("data.jsonl", None, "the file name data.jsonl names no SCBench task; choose from kv, prefix_suffix"),
        ("x", "hashhop", "unknown SCBench task 'hashhop'; choose from kv, prefix_suffix"),
        ("scbench_repoqa.jsonl", None, "SCBench's repoqa is not served: to judge its answers needs"),
        ("x", "scbench_summary", "SCBench's summary is not served: to judge its answers needs ROUGE"),
    ],
)
def test_tasks_that_are_not_served_are_named(written, name, task, said):
    with pytest.raises(ValueError, match=said):
        read_scbench(written([row("kv")], name), task)


def test_an_empty_file_and_a_missing_one_are_told(written, tmp_path):
    with pytest.raises(ValueError, match="scbench_kv.jsonl holds no row with a turn of kv; give a file with at least"):
        read_scbench(written([b""]))
    with pytest.raises(FileNotFoundError, match="scbench_kv"):
        read_scbench(tmp_path / "none" / "scbench_kv.jsonl")


@pytest.mark.parametrize("task", ["kv", "prefix_suffix", "mf"])
def test_generated_examples_written_as_published_read_as_they_were(written, task):
    made = scbench_maker(task, 2048, 0, 1, None)(20)
    begin = PROMPTS["kv"][0].partition("JSON data")[0] if task == "kv" else ""
    first = made.context.partition("\n\n")[0] + "\n\n" if task == "mf" else ""
    body = made.context.removeprefix(begin).removeprefix(first)
    turns = [
        {
            "input": turn.ask.rpartition("\n\n")[2] if task == "mf" else turn.ask,
            "answer": int(turn.refs[0]) if task == "mf" else turn.refs[0],
        }
        for turn in made.turns
    ]
    context = json.loads(body) if task == "mf" else body
    (read,) = read_scbench(written([{"id": 0, "context": context, "multi_turns": turns}]), task)
    assert (read.context, read.joint) == (made.context, made.joint)
    same = ("ask", "refs", "scorer", "max_new_tokens", "golden")
    assert [[getattr(t, f) for f in same] for t in read.turns] == [[getattr(t, f) for f in same] for t in made.turns]


def test_the_first_and_last_halves_of_a_context_stay():
    def encode(text):
        return [ord(letter) for letter in text]

    def decode(ids):
        return "".join(map(chr, ids))

    assert truncate_middle("abcdefghij", 6, encode, decode) == "abchij"
    # As in the harness, an odd number leaves one out.
    assert truncate_middle("abcdefghij", 7, encode, decode) == "abchij"
    assert truncate_middle("abcdefghij", 10, encode, decode) == "abcdefghij"
    assert truncate_middle("abcdefghij", 2, encode, decode) == "aj"
    with pytest.raises(ValueError, match="n_tokens must be at least 2, one for each end of the text, got 1"):
        truncate_middle("abc", 1, encode, decode)


def test_a_context_is_cut_to_the_tokens_of_a_model():
    llm = load()
    example = scbench_maker("kv", 8192, 0, 1, None)(100)
    cut = truncate_middle(example.context, 1000, llm.encode_text, llm.decode)
    assert abs(len(llm.encode_text(cut)) - 1000) < 5
    assert example.context.startswith(cut[:500])
    assert example.context.endswith(cut[-500:])
    assert Prompts(llm).count(example) > 2000
