"""RULER's question answering (arXiv 2404.06654) from a local file: SQuAD (qa_1) or HotpotQA (qa_2), as published.

A question's own documents stand among others of the same file, in random order; any of its answers counts.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from retrieval_attn.bench.quality.examples import Example, Turn, rng_of

SQUAD, HOTPOT = TASKS = ("qa_1", "qa_2")

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
QA_BEGIN = f"{INSTRUCTION}\n\nThe following are given documents.\n\n"
QA_ASK = f"\n\n{INSTRUCTION}\n\nQuestion: {{query}}"
QA_PREFIX = " Answer:"
QA_TOKENS = 32

SHAPES = (
    'SQuAD\'s {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]} or HotpotQA\'s '
    '[{"question": ..., "answer": ..., "context": [[title, [sentences]], ...]}]'
)


class Question(NamedTuple):
    """own: documents that hold the answer, or come with the question. near: others of its article, the first that are
    added. Both are numbers of documents."""

    ask: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...]


class QaData(NamedTuple):
    """Questions of a file. task: one of TASKS. documents: all of the file, each once, sorted."""

    path: Path
    task: str
    documents: list[str]
    questions: list[Question]


def read_qa(path: str | Path) -> QaData:
    """Questions of SQuAD's or HotpotQA's JSON, whichever it is; those without an answer are left out.

    Raises OSError for a file that cannot be read, and ValueError in one line for one of another shape.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start + 1}; give {SHAPES}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); give {SHAPES}") from error
    squad = isinstance(data, dict) and "data" in data
    if not squad and not isinstance(data, list):
        raise ValueError(f"{path} is neither SQuAD nor HotpotQA; give {SHAPES}")
    read, task = (_squad, SQUAD) if squad else (_hotpot, HOTPOT)
    found = _numbered(path, task, list(read(_Part(path, "", data))))
    if not found.questions:
        raise ValueError(f"{path} holds no question with an answer; give {SHAPES}")
    return found


def qa_maker(data: QaData, n_tokens: int, sample: int, seed: int) -> Callable[[int], Example]:
    """What `fit` asks for examples of growing size, in documents: a question's own at least, all of the file at most.

    sample: which question, in an order that depends on the seed; the same for all lengths. The same arguments give the
    same examples. Raises ValueError for a sample beyond the questions.
    """
    if not 0 <= sample < len(data.questions):
        most = len(data.questions) - 1
        raise ValueError(f"sample must be between 0 and {most} (questions of {data.path}, less one), got {sample}")
    question = data.questions[int(rng_of(seed, data.task).permutation(len(data.questions))[sample])]
    words = (seed, data.task, n_tokens, sample)
    rng = rng_of(*words)
    near = rng.permutation(question.near).tolist()
    known = {*question.own, *near}
    others = [int(i) for i in rng.permutation(len(data.documents)) if i not in known]
    ranked = [*question.own, *near, *others]

    def make(size: int) -> Example:
        chosen = ranked[: max(size, len(question.own))]
        shuffled = [chosen[i] for i in rng_of(*words, "order").permutation(len(chosen))]
        return _example(data, question, shuffled, f"{n_tokens}-{sample}")

    return make


def _example(data: QaData, question: Question, chosen: list[int], name: str) -> Example:
    texts = [f"Document {i}:\n{data.documents[number]}" for i, number in enumerate(chosen, 1)]
    context = QA_BEGIN + "\n\n".join(texts)
    # Where two documents hold the answer together there is no one place.
    depth = None
    if data.task == SQUAD:
        depth = context.index(texts[chosen.index(question.own[0])]) / len(context)
    ask, golden = QA_ASK.format(query=question.ask), question.answers[0]
    turn = Turn(ask, question.answers, "any", QA_TOKENS, QA_PREFIX, golden=golden, depth=depth)
    return Example(data.task, name, context, (turn,), facts={"documents": chosen, "own": question.own})


class _Asked(NamedTuple):
    """A question with the texts of its documents."""

    ask: str
    answers: tuple[str, ...]
    own: list[str]
    near: list[str]


def _numbered(path: Path, task: str, asked: list[_Asked]) -> QaData:
    documents = sorted({text for one in asked for text in (*one.own, *one.near)})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for one in (one for one in asked if one.answers):
        own = dict.fromkeys(number[text] for text in one.own)
        near = dict.fromkeys(number[text] for text in one.near if number[text] not in own)
        questions.append(Question(one.ask, one.answers, tuple(own), tuple(near)))
    return QaData(path, task, documents, questions)


class _Part(NamedTuple):
    """A value of the file, and where it stands in it."""

    path: Path
    where: str
    value: Any

    def at(self, key: str) -> "_Part":
        if not isinstance(self.value, dict) or key not in self.value:
            raise self.error(f"an object with {key!r}")
        return _Part(self.path, f"{self.where}.{key}".lstrip("."), self.value[key])

    def items(self) -> list["_Part"]:
        if not isinstance(self.value, list):
            raise self.error("a list")
        return [_Part(self.path, f"{self.where}[{i}]", value) for i, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            raise self.error("a text that is not empty")
        return self.value

    def error(self, rule: str) -> ValueError:
        return ValueError(f"{self.path}: {self.where} must be {rule}; give {SHAPES}")


def _squad(whole: _Part) -> Iterator[_Asked]:
    for article in whole.at("data").items():
        paragraphs = article.at("paragraphs").items()
        texts = [paragraph.at("context").text() for paragraph in paragraphs]
        for paragraph, text in zip(paragraphs, texts, strict=True):
            for asked in paragraph.at("qas").items():
                ask, answers = asked.at("question").text(), asked.at("answers").items()
                possible = not asked.value.get("is_impossible", False)
                told = [answer.at("text").text() for answer in answers if possible]
                yield _Asked(ask, tuple(dict.fromkeys(told)), [text], texts)


def _hotpot(whole: _Part) -> Iterator[_Asked]:
    for asked in whole.items():
        own = [_titled(document) for document in asked.at("context").items()]
        if not own:
            raise asked.at("context").error("a list of at least one document")
        yield _Asked(asked.at("question").text(), (asked.at("answer").text(),), own, [])


def _titled(document: _Part) -> str:
    parts = document.items()
    if len(parts) != 2:
        raise document.error("a title and a list of sentences")
    title, sentences = parts
    texts = [sentence.value for sentence in sentences.items()]
    if not isinstance(title.value, str) or not all(isinstance(text, str) for text in texts):
        raise document.error("a title and a list of sentences")
    return f"{title.value}\n{''.join(texts)}"
