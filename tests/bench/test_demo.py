"""The demo: both sides are asked the same, and a wrong answer is an exit status."""

import io

import pytest
from rich.console import Console
from tiny_models import save_tiny_chat_model

from retrieval_attn import load
from retrieval_attn.bench import demo
from retrieval_attn.bench.shared.facts import make_facts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def _small(monkeypatch):
    """Sizes that a byte tokenizer and a slow machine can bear."""
    monkeypatch.setattr(demo, "N_FACTS", 8)
    monkeypatch.setattr(demo, "MOST_NEW_TOKENS", 6)
    monkeypatch.setattr(demo, "WARM_UP_TOKENS", 64)
    monkeypatch.setattr(demo, "LEAST_TOKENS", 1000)


def report(*answers):
    return demo.Side([1, 2], list(answers), 2.0, 1.0, [0.5, 0.1], [0.02, 0.01, 0.03], [0.02, 0.04], 10**6, 10**9)


def asked(n):
    return [demo.Question(fact, 0.5, [1, 2, 3]) for fact in make_facts(n, seed=0)]


@pytest.mark.usefixtures("_small")
def test_a_model_that_knows_nothing_fails_with_its_answers_named(model, console):
    assert demo.run_demo(1200, 2, console=console, model=model) == 1
    text = console.file.getvalue()
    assert "answers right" in text
    assert "0 of 2" in text
    assert "full attention" in text
    assert text.count("wrong: ") == 2
    assert " cores, " in text


@pytest.mark.usefixtures("_small")
def test_both_sides_answer_alike_when_everything_is_retrieved(model, console):
    """The same ids, the same greedy choice: with top_k beyond the document the answers are the same."""
    llm = load(model, demo.RetrievalConfig(index="exact", top_k=100_000))
    text, questions = demo.make_questions(llm, 1200, 2, seed=1)
    ours = demo.ask_retrieval(llm, text, questions, console)
    full = demo.ask_full_attention(model, ours.read_ids, questions, llm.stop_ids(), llm.tokenizer, console)
    assert ours.answers == full.answers
    assert len(full.ttft_s) == len(ours.ttft_s) == 2
    assert len(full.steps_s) == len(ours.steps_s)
    # Nobody reads the document again for a question.
    assert len(ours.read_ids) - len(full.read_ids) <= 1
    assert full.device_bytes == 3 * 2 * 2 * 16 * 4 * len(full.read_ids)


@pytest.mark.usefixtures("_small")
def test_the_questions_follow_the_document(model):
    llm = load(model)
    text, questions = demo.make_questions(llm, 1200, 3, seed=0)
    assert [question.depth for question in questions] == sorted(question.depth for question in questions)
    for question in questions:
        assert question.fact.sentence in text
        assert llm.decode(question.ids).endswith(question.fact.question)
        assert len(question.ids) <= 1200


@pytest.mark.parametrize(("tokens", "n_questions"), [(100, 3), (10**9, 3), (4096, 0), (4096, 103)])
def test_numbers_out_of_range_are_refused(model, tokens, n_questions):
    with pytest.raises(ValueError, match="must be between"):
        demo.run_demo(tokens, n_questions, console=Console(file=io.StringIO()), model=model)


def test_an_answer_is_right_to_the_letter():
    questions = asked(2)
    right = [question.fact.answer for question in questions]
    assert demo.n_right(report(*right), questions) == 2
    assert demo.n_right(report(right[0] + ".", right[1]), questions) == 1


def test_the_verdict_names_what_is_wrong(console):
    questions = asked(2)
    right = [question.fact.answer for question in questions]
    assert demo.verdict(report(*right), questions, console) == 0
    assert console.file.getvalue() == ""
    assert demo.verdict(report(right[0], "no idea"), questions, console) == 1
    assert "the answer was 'no idea'" in console.file.getvalue()


def test_the_table_holds_both_sides(console):
    console.print(demo.comparison(report("a", "b"), report("a", "b"), asked(2)))
    text = console.file.getvalue()
    # The first token waits for prefill, index and question; later ones for their question.
    for cell in ("3.5 s", "0.10 s", "20.0 ms", "3.00 %", "1 MB", "1.0 GB"):
        assert cell in text


def test_the_common_prefix():
    assert demo.common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert demo.common_prefix([[1], [2]]) == []


def test_an_interrupt_stops_the_builds(model, console, monkeypatch):
    llm = load(model)
    stopped = []
    session = llm.session()
    monkeypatch.setattr(llm, "session", lambda: session)
    monkeypatch.setattr(session.cache, "cancel_builds", lambda: stopped.append(True))

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.ask_retrieval(llm, "text", asked(1), console)
    assert stopped == [True]
