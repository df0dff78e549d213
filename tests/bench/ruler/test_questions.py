"""RULER's question answering: files of both shapes, and prompts of any size made of them."""

import json
import re
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from retrieval_attn import load
from retrieval_attn.bench.quality.examples import Prompts, fit
from retrieval_attn.bench.ruler.questions import qa_maker, read_qa
from retrieval_attn.bench.shared.facts import prose

N_ARTICLES, N_PARAGRAPHS = 40, 8
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
PUBLISHED = (
    INSTRUCTION + "\n\nThe following are given documents.\n\n{context}\n\n" + INSTRUCTION + "\n\nQuestion: {query}"
)


@cache
def paragraph(article, i):
    return f"The colour of house {article}-{i} is shade{article}x{i}. {prose(400, 100 * article + i)}"


def squad():
    """Forty articles of eight paragraphs, a question about each, and one that cannot be answered."""
    data = []
    for a in range(N_ARTICLES):
        paragraphs = []
        for i in range(N_PARAGRAPHS):
            told = [{"text": f"shade{a}x{i}"}, {"text": f"the shade{a}x{i}"}, {"text": f"shade{a}x{i}"}]
            asked = {"question": f"What colour is house {a}-{i}?", "answers": told, "is_impossible": False}
            paragraphs.append({"context": paragraph(a, i), "qas": [asked]})
        paragraphs[0]["qas"].append({"question": "Why?", "answers": [], "is_impossible": True})
        data.append({"title": str(a), "paragraphs": paragraphs})
    return {"version": "v2.0", "data": data}


def hotpot():
    """Forty questions with ten documents each, some of them common to several."""
    made = []
    for q in range(40):
        documents = [[f"House {q + i}", [f"It is shade{q + i}.", f" {prose(300, q + i)}"]] for i in range(10)]
        made.append({"question": f"Which colour is house {q}?", "answer": f"shade{q}", "context": documents, "_id": q})
    return made


@pytest.fixture(scope="module")
def prompts():
    return Prompts(load())


@pytest.fixture
def written(tmp_path):
    def write(data):
        path = tmp_path / "qa.json"
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        return path

    return write


@pytest.fixture(scope="module", params=[squad, hotpot])
def data(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "qa.json"
    path.write_text(json.dumps(request.param()))
    return read_qa(path)


def documents(example):
    """The documents of a context, whose numbers must run from 1 on."""
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", example.context.partition("given documents.\n\n")[2])
    assert parts[0] == ""
    assert [int(number) for number in parts[1::2]] == list(range(1, 1 + len(parts) // 2))
    return parts[2::2]


def test_both_shapes_are_told_apart(written):
    one, two = read_qa(written(squad())), read_qa(written(hotpot()))
    assert (one.task, two.task) == ("qa_1", "qa_2")
    # The question without an answer is left out; documents are kept once.
    assert (len(one.questions), len(one.documents)) == (N_ARTICLES * N_PARAGRAPHS, N_ARTICLES * N_PARAGRAPHS)
    assert (len(two.questions), len(two.documents)) == (40, 49)
    assert one.questions[0].answers == ("shade0x0", "the shade0x0")
    assert two.documents == sorted(two.documents)
    assert f"House 7\nIt is shade7. {prose(300, 7)}" in two.documents


def test_the_first_squad_says_nothing_of_impossible_questions(written):
    data = squad()
    for article in data["data"]:
        for part in article["paragraphs"]:
            part["qas"] = [{k: v for k, v in one.items() if k != "is_impossible"} for one in part["qas"]]
    assert read_qa(written(data)).questions == read_qa(written(squad())).questions


@pytest.mark.parametrize("size", [1, 5, 20, 45])
def test_the_answer_is_found_in_its_own_document_among_others(data, size):
    example = qa_maker(data, 8192, 3, 1)(size)
    (turn,) = example.turns
    found = documents(example)
    assert len(found) == len(set(found)) == max(size, 1 if data.task == "qa_1" else 10)
    assert set(found) <= set(data.documents)
    house = re.search(r"house ([\d-]+)\?", turn.ask)[1]
    wanted = rf"house {house} is (\w+)\." if data.task == "qa_1" else rf"House {house}\nIt is (\w+)\."
    (answer,) = re.findall(wanted, example.context)
    assert turn.refs[0] == turn.golden == answer
    assert (turn.scorer, turn.max_new_tokens, turn.prefix) == ("any", 32, " Answer:")


def test_the_prompt_is_the_published_one(data):
    example = qa_maker(data, 8192, 0, 1)(12)
    found, query = documents(example), example.turns[0].ask.rpartition("Question: ")[2]
    context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(found, 1))
    prompt = example.context + example.joint + example.turns[0].ask
    assert prompt == PUBLISHED.format(context=context, query=query)


def test_the_article_of_a_question_is_added_first(written):
    data = read_qa(written(squad()))
    for size in (3, N_PARAGRAPHS, 50):
        example = qa_maker(data, 8192, 5, 1)(size)
        article = re.search(r"house (\d+)-", example.turns[0].ask)[1]
        same = [text for text in documents(example) if text.startswith(f"The colour of house {article}-")]
        assert len(same) == min(size, N_PARAGRAPHS)


def test_own_documents_stand_anywhere(written):
    data = read_qa(written(squad()))
    depths = []
    for sample in range(200):
        example = qa_maker(data, 8192, sample, 1)(20)
        at = example.context.index(example.turns[0].refs[0]) / len(example.context)
        assert abs(at - example.turns[0].depth) < 0.03
        depths.append(at)
    assert np.histogram(depths, 4, (0, 1))[0].min() > 30
    assert qa_maker(read_qa(written(hotpot())), 8192, 0, 1)(20).turns[0].depth is None


def test_larger_examples_hold_the_documents_of_smaller_ones(data):
    make = qa_maker(data, 8192, 2, 1)
    made = [set(documents(make(size))) for size in range(1, 50)]
    assert all(small <= large for small, large in pairwise(made))
    assert set(documents(make(10**6))) == set(data.documents)


def test_examples_follow_from_their_arguments_alone(data):
    def make(n_tokens=8192, sample=0, seed=1):
        return qa_maker(data, n_tokens, sample, seed)(30)

    assert make() == make()
    others = [make(), make(seed=2), make(sample=1), make(n_tokens=16384)]
    assert len({example.context for example in others}) == 4
    # Lengths ask the same question, other samples another.
    assert make().turns[0].ask == make(n_tokens=16384).turns[0].ask != make(sample=1).turns[0].ask
    asked = {qa_maker(data, 8192, sample, 1)(1).turns[0].ask for sample in range(40)}
    assert len(asked) == 40


@pytest.mark.parametrize("n_tokens", [8192, 32768])
def test_prompts_have_the_tokens_asked_for_and_never_more(prompts, written, n_tokens):
    data = read_qa(written(squad()))
    example = fit(qa_maker(data, n_tokens, 0, 1), n_tokens, prompts, 1 << 20)
    # A document has more than a hundredth of 8K.
    longest = max(len(text) for text in data.documents) // 3
    assert n_tokens - max(n_tokens // 100, longest) <= prompts.count(example) <= n_tokens


def test_a_file_that_is_too_short_for_a_length_is_told(prompts, data):
    with pytest.raises(ValueError, match=rf"{data.task} has text for \d+ tokens only, got 1000000; ask for a shorter"):
        fit(qa_maker(data, 1_000_000, 0, 1), 1_000_000, prompts, 1 << 21)


def test_samples_beyond_the_questions_are_told(data):
    n = len(data.questions)
    for sample in (-1, n):
        with pytest.raises(ValueError, match=rf"sample must be between 0 and {n - 1} .*, got {sample}"):
            qa_maker(data, 8192, sample, 1)


ASKED = {"question": "Q?", "answers": [{"text": "A"}]}
PARAGRAPH = {"context": "Text.", "qas": [ASKED]}
ROW = {"question": "Q?", "answer": "A", "context": [["T", ["S."]]]}


def squad_of(*paragraphs):
    return {"data": [{"paragraphs": list(paragraphs)}]}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (b"{'a'}", ", line 1: not JSON (Expecting property name enclosed in double quotes)"),
        (b'["\xff"]', " is not UTF-8 at byte 3"),
        ("text", " is neither SQuAD nor HotpotQA"),
        ({"rows": []}, " is neither SQuAD nor HotpotQA"),
        ([], " holds no question with an answer"),
        (squad_of(), " holds no question with an answer"),
        ({"data": {}}, ": data must be a list"),
        ({"data": [{}]}, ": data[0] must be an object with 'paragraphs'"),
        (squad_of(PARAGRAPH, {"qas": []}), ": data[0].paragraphs[1] must be an object with 'context'"),
        (squad_of(PARAGRAPH | {"qas": None}), ": data[0].paragraphs[0].qas must be a list"),
        (squad_of(PARAGRAPH | {"qas": ["x"]}), ": data[0].paragraphs[0].qas[0] must be an object with 'question'"),
        (
            squad_of(PARAGRAPH | {"qas": [ASKED | {"answers": [{"text": 5}]}]}),
            ": data[0].paragraphs[0].qas[0].answers[0].text must be a text that is not empty",
        ),
        (["x"], ": [0] must be an object with 'context'"),
        ([ROW, ROW | {"answer": ""}], ": [1].answer must be a text that is not empty"),
        ([ROW | {"context": []}], ": [0].context must be a list of at least one document"),
        ([ROW | {"context": {"title": []}}], ": [0].context must be a list"),
        ([ROW | {"context": [["T"]]}], ": [0].context[0] must be a title and a list of sentences"),
        ([ROW | {"context": [["T", [5]]]}], ": [0].context[0] must be a title and a list of sentences"),
        ([{"answer": "A", "context": ROW["context"]}], ": [0] must be an object with 'question'"),
    ],
)
def test_files_of_another_shape_are_told_in_a_line(written, wrong, said):
    path = written(wrong)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read_qa(path)
    assert str(raised.value).startswith(f"{path}{said}")
    assert str(raised.value).endswith('[{"question": ..., "answer": ..., "context": [[title, [sentences]], ...]}]')
    assert "\n" not in str(raised.value)
