"""Scorers: right, nearly right and wrong answers, as RULER and SCBench's compute_scores.py judge them."""

import pytest

from retrieval_attn.bench.quality.scoring import SCORERS, score

KEY = "5f3a-77"


@pytest.mark.parametrize(
    ("answer", "refs", "wanted"),
    [
        ("They are ABCDE, FGHIJ and KLMNO.", ["ABCDE", "FGHIJ", "KLMNO"], 1),
        ("abcde fghij", ["ABCDE", "FGHIJ", "KLMNO"], 2 / 3),
        ("  ABCDE\x01FGHIJ", ["ABCDE", "FGHIJ"], 1),
        ("ABCD E", ["ABCDE"], 0),
        ("", ["ABCDE"], 0),
        # Of a number within a number RULER sees no harm.
        ("12345678", ["1234567"], 1),
    ],
)
def test_all_is_the_share_of_references_said(answer, refs, wanted):
    assert score("all", answer, refs) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "refs", "wanted"),
    [
        ("It was in denver, Colorado.", ["Denver", "Boston"], 1),
        ("Boston", ["Denver", "Boston"], 1),
        ("Den ver", ["Denver"], 0),
        ("(b)", ["(B)"], 1),
        ("B", ["(B)"], 0),
    ],
)
def test_any_wants_one_reference(answer, refs, wanted):
    assert score("any", answer, refs) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"), [(f'"{KEY}".', 1), (KEY, 1), (KEY.upper(), 0), (KEY[:-1], 0), ("", 0), (KEY + "8", 1)]
)
def test_contains_is_to_the_letter(answer, wanted):
    assert score("contains", answer, [KEY]) == wanted
    # Only the first reference counts.
    assert score("contains", answer, [KEY, ""]) == wanted


@pytest.mark.parametrize(
    ("answer", "ref", "wanted"),
    [
        ("742", "742", 1),
        ("The number is 742, not 741.", "742", 1),
        ("not 741 but 742", "742", 0),
        ("742.9", "742", 1),
        ("743", "742", 0),
        ("none", "742", 0),
        ("", "742", 0),
        ("0742", "742", 1),
        ("7.5", "7.5", 1),
        ("7", "7.5", 0),
        ("7.50", "7.5", 1),
        ("7", "7.0", 1),
        ("-742", "742", 1),
        ("9" * 400, "742", 0),
        ("9" * 400, "742.5", 0),
    ],
)
def test_number_reads_the_first_one(answer, ref, wanted):
    assert score("number", answer, [ref]) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("42336.", 1),
        ("is 42336, 42336", 1),
        ("123 42336", 0),
        ("423360", 0),
        ("42,336", 0),
        ("4233", 0),
        ("none", 0),
        ("\u0664\u0662\u0663\u0663\u0666", 0),
        ("\u0664 42336", 1),
    ],
)
def test_first_number_is_a_run_of_ascii_digits(answer, wanted):
    assert score("first_number", answer, ["42336"]) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("B", 1),
        (" B. London", 1),
        ("Because", 1),
        ("A", 0),
        ("b", 0),
        ("London", 1),
        ("London!", 0),
        ("I think the answer is: B", 1),
        ('The answer is "B".', 1),
        ("The answer is London", 1),
        ("The answer is Paris", 0),
        # Any word of B or D will do where a letter is looked for.
        ("The answer is Boston", 1),
        ("Denver", 0),
        ("The answer is:", 0),
        ("My answer: C", 0),
        ("the right option is B, the answer is C", 0),
        ("It must be B then", 1),
        ("It must be A or B", 0),
        ("no idea", 0),
        ("", 0),
    ],
)
def test_choice_finds_the_letter_or_the_text(answer, wanted):
    assert score("choice", answer, ["B", "London"]) == wanted


@pytest.mark.parametrize(
    ("answer", "refs", "wanted"),
    [
        ("The Old Bridge!", ["an old bridge"], 1),
        ("old bridge by night", ["the old bridge"], 2 / 3),
        ("bridge bridge", ["bridge"], 2 / 3),
        ("river", ["old bridge", "river bank"], 2 / 3),
        ("road", ["old bridge"], 0),
        ("", ["old bridge"], 0),
        ("the", ["a"], 0),
    ],
)
def test_f1_counts_words(answer, refs, wanted):
    assert score("f1", answer, refs) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "refs", "wanted"),
    [
        ("北京。", ["北京"], 1),
        ("「北京」 市", ["北京"], 4 / 5),
        ("东京", ["北京"], 1 / 2),
        ("上海", ["北京"], 0),
        ("", ["北京"], 0),
        ("上海", ["北京", "上海市"], 4 / 5),
        # Marks that the published list leaves out count as characters.
        ("卡尔·马", ["卡尔马"], 6 / 7),
        ("《红楼梦》", ["红楼梦"], 6 / 7),
    ],
)
def test_f1_characters_counts_characters(answer, refs, wanted):
    assert score("f1_characters", answer, refs) == pytest.approx(wanted)


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_lie_between_none_and_all(scorer):
    for answer in ("", " ", "B", "742", "742 B the answer is", "\n", "《》", "..."):
        assert 0 <= score(scorer, answer, ["742"]) <= 1
    assert score(scorer, "742" if scorer != "choice" else "B", ["742" if scorer != "choice" else "B"]) == 1


def test_unknown_scorers_and_no_references_are_refused():
    with pytest.raises(ValueError, match="unknown scorer 'exact'; choose from all, any"):
        score("exact", "a", ["a"])
    with pytest.raises(ValueError, match="at least one reference"):
        score("all", "a", [])
