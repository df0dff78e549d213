"""SCBench's published files (arXiv 2412.10319) as examples: JSON lines of one task, each a context and turns about it.

Templates, scorers and budgets are those of the published harness where it uses a chat template. Three things are ours:
contexts and questions are joined as in `tasks.py`; of mixed tasks only the turns are asked that need neither
ROUGE nor code to judge them; and a text as answer is one reference, where the harness takes each of its letters for one
in ICL.ManyShot and Zh.QA.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from retrieval_attn.bench.quality.examples import Example, Turn
from retrieval_attn.bench.quality.scoring import CHOICES
from retrieval_attn.bench.scbench.tasks import BLANK_LINE, KV_BEGIN, MF_BEGIN, N_TURNS, PASSKEY_BEGIN


@dataclass(frozen=True)
class Published:
    """How a task is asked and judged. begin: what stands before the context. ask: the question, of {input} and options
    {A} to {D}. part: the turns of a mixed task that are asked; empty for all."""

    scorer: str
    max_new_tokens: int
    begin: str = ""
    ask: str = "{input}"
    part: str = ""


# "The the" is how it was published.
CHOICE_ASK = "Question: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe the correct answer is"
BOOK = "Read the book and answer the question."
BOOK_CHN, ASK_CHN = "阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案："  # noqa: RUF001

TASKS = {
    "kv": Published("contains", 150, KV_BEGIN),
    "prefix_suffix": Published("contains", 150),
    "vt": Published("all", 30),
    "mf": Published("number", 5),
    "many_shot": Published("any", 10),
    "passkey": Published("first_number", 15, PASSKEY_BEGIN),
    "choice_eng": Published("choice", 40, f"{BOOK}\n\n", CHOICE_ASK),
    "qa_eng": Published("any", 40, f"{BOOK} Be very concise in your answer.\n\n", "Question: {input}\nAnswer:"),
    "qa_chn": Published("f1_characters", 40, BOOK_CHN, ASK_CHN),
    "summary_with_needles": Published("first_number", 15, part="passkey"),
    "repoqa_and_kv": Published("contains", 80, part="kv"),
}

UNSERVED = {"repoqa": "needs parsers of programming languages", "summary": "needs ROUGE"}

PREFIXES = ("scbench_", "multi_turn_")


def read_scbench(path: str | Path, task: str | None = None, most_turns: int | None = N_TURNS) -> list[Example]:
    """The examples of a published file, in its order.

    task: one of TASKS, with or without "scbench_"; None takes it from the file's name. most_turns: so many turns of a
    row are read, as in the harness; None for all. Rows of mixed tasks of which no turn is left are left out.
    Raises OSError for a file that cannot be read, and ValueError in one line for another task or format.
    """
    path = Path(path)
    name = _task(path, task)
    examples = [_example(name, row, most_turns) for row in _rows(path)]
    found = [example for example in examples if example.turns]
    if not found:
        raise ValueError(f"{path} holds no row with a turn of {name}; give a file with at least one")
    return found


def truncate_middle(
    text: str, n_tokens: int, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> str:
    """The text of the first and the last n_tokens // 2 tokens, as the harness shortens contexts; all of it if that has
    no more than n_tokens.

    Where the halves meet, tokens may join or part when it is encoded again, so that their number differs by a few.
    Raises ValueError for n_tokens < 2.
    """
    if n_tokens < 2:
        raise ValueError(f"n_tokens must be at least 2, one for each end of the text, got {n_tokens}")
    ids = encode(text)
    half = n_tokens // 2
    return text if len(ids) <= n_tokens else decode([*ids[:half], *ids[-half:]])


def _task(path: Path, task: str | None) -> str:
    name = path.name.partition(".")[0] if task is None else task
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if name in UNSERVED:
        raise ValueError(f"SCBench's {name} is not served: to judge its answers {UNSERVED[name]}")
    if name not in TASKS:
        told = f"the file name {path.name} names no SCBench task" if task is None else f"unknown SCBench task {task!r}"
        raise ValueError(f"{told}; choose from {', '.join(TASKS)}")
    return name


class _Row(NamedTuple):
    """A line of a file. number: among the rows, from 0, which is an example's id in the harness."""

    path: Path
    line: int
    number: int
    fields: dict[str, Any]

    def error(self, what: str) -> ValueError:
        return _error(self.path, self.line, what)


class _Turn(NamedTuple):
    """One of a row's turns; number: from 1."""

    row: _Row
    number: int
    fields: dict[str, Any]

    def error(self, what: str) -> ValueError:
        return self.row.error(f"turn {self.number}: {what}")

    def text(self, key: str) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(f"{key} must be a text, got {_kind(value)}")
        return value


def _error(path: Path, line: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {line}: {what}")


def _kind(value: Any) -> str:
    if value == "":
        return "an empty one"
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "none")


def _rows(path: Path) -> Iterator[_Row]:
    number = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                yield _Row(path, line, number, _fields(path, line, raw))
                number += 1


def _fields(path: Path, line: int, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.rstrip().decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise _error(path, line, f"not UTF-8 at byte {error.start + 1}; give JSON lines in UTF-8") from error
    except json.JSONDecodeError as error:
        what = f"not JSON at column {error.colno} ({error.msg}); give one JSON object in each line"
        raise _error(path, line, what) from error
    if not isinstance(fields, dict):
        raise _error(path, line, f"a row must be an object with context and multi_turns, got {_kind(fields)}")
    return fields


def _example(task: str, row: _Row, most_turns: int | None) -> Example:
    how = TASKS[task]
    asked = [turn for turn in _turns(row)[:most_turns] if not how.part or _part(turn) == how.part]
    begins = [_number_asked(turn) if task == "mf" else "" for turn in asked]
    context = how.begin + "".join(begins[:1]) + _context(row)
    turns = tuple(_made(how, turn, begin) for turn, begin in zip(asked, ["", *begins[1:]], strict=False))
    return Example(task, str(row.number), context, turns, BLANK_LINE)


def _context(row: _Row) -> str:
    context = row.fields.get("context", row.fields.get("input"))
    # Numbers of Math.Find are published as a list.
    if isinstance(context, list) and context:
        return str(context)
    if not isinstance(context, str) or not context:
        raise row.error(f"context (or input) must be a text or a list of numbers, got {_kind(context)}")
    return context


def _turns(row: _Row) -> list[_Turn]:
    turns = row.fields.get("multi_turns")
    if not isinstance(turns, list) or not turns:
        got = "an empty one" if turns == [] else _kind(turns)
        raise row.error(f"multi_turns must be a list of at least one object with input and answer, got {got}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise row.error(f"turn {number} must be an object with input and answer, got {_kind(turn)}")
    return [_Turn(row, number, turn) for number, turn in enumerate(turns, 1)]


def _part(turn: _Turn) -> str:
    return turn.text("task").removeprefix(PREFIXES[0])


def _number_asked(turn: _Turn) -> str:
    """What Math.Find asks for, from the words before the answer."""
    found = re.search(r"The .+(?= is)", turn.text("input"))
    if found is None:
        raise turn.error('input must end in "The ... is", of which the question is made')
    return MF_BEGIN.format(what=found[0].lower())


def _made(how: Published, turn: _Turn, begin: str) -> Turn:
    options = _options(turn) if how.scorer == "choice" else []
    ask = begin + how.ask.format(input=turn.text("input"), **dict(zip(CHOICES, options, strict=False)))
    refs = _refs(how, turn)
    if options:
        if refs[0] not in options:
            raise turn.error(f"answer must be one of the options, got {refs[0]!r}")
        refs = (CHOICES[options.index(refs[0])], refs[0])
    # Several words are told as the harness tells them.
    golden = str(turn.fields["answer"])
    return Turn(ask, refs, how.scorer, how.max_new_tokens, golden=golden, part=how.part)


def _options(turn: _Turn) -> list[str]:
    options = turn.fields.get("options")
    if not isinstance(options, list) or len(options) != len(CHOICES) or not all(isinstance(o, str) for o in options):
        got = f"a list of {len(options)}" if isinstance(options, list) else _kind(options)
        raise turn.error(f"options must be a list of {len(CHOICES)} texts, got {got}")
    return options


def _refs(how: Published, turn: _Turn) -> tuple[str, ...]:
    answer = turn.fields.get("answer")
    answers = answer if isinstance(answer, list) else [answer]
    kinds, name = ((int, float), "number") if how.scorer == "number" else ((str,), "text")
    # Any answer holds an empty text.
    wrong = [one for one in answers if type(one) not in kinds or one == ""]
    if wrong or not answers:
        got = f"a list with {_kind(wrong[0])}" if wrong and answers is answer else _kind(answer)
        raise turn.error(f"answer must be a {name} or a list of {name}s, got {got if answers else 'an empty one'}")
    return tuple(str(one) for one in answers)
