"""How an answer is judged, as RULER and SCBench publish it: a number from 0 to 1 from a text and its references.

Scorers know nothing of models, prompts or generators.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Scorer = Callable[[str, Sequence[str]], float]

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_DIGITS = re.compile(r"[0-9]+")

# What is left away from Chinese answers, as published: 《 stays, 》 goes.
_PUNCTUATION = frozenset(
    string.punctuation + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》"  # noqa: RUF001
    "「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"  # noqa: RUF001
)

# What precedes a choice in a sentence, in the order in which SCBench looks for it.
_CHOICE_LEADS = ("answer is:", "answer:", "answer is", "option is")
CHOICES = "ABCD"


def match_all(answer: str, refs: Sequence[str]) -> float:
    """The share of the references that the answer contains, in any case (RULER's string_match_all)."""
    said = _CONTROL.sub("\n", answer.strip()).lower()
    return sum(ref.lower() in said for ref in refs) / len(refs)


def match_any(answer: str, refs: Sequence[str]) -> float:
    """1 if the answer contains one of the references, in any case (RULER's string_match_part for one answer)."""
    return float(any(ref.lower() in answer.lower() for ref in refs))


def contains(answer: str, refs: Sequence[str]) -> float:
    """1 if the answer contains the first reference to the letter (SCBench's Retr.KV and Retr.Prefix-Suffix)."""
    return float(refs[0] in answer)


def number(answer: str, refs: Sequence[str]) -> float:
    """1 if the first number in the answer equals the reference (Math.Find): as integers, unless that is a fraction."""
    found = _NUMBER.search(answer)
    if found is None:
        return 0.0
    said, wanted = float(found[0]), float(refs[0])
    # Not int(), which hundreds of digits, an infinity, do not survive.
    return float(said == wanted if "." in refs[0] else said // 1 == wanted)


def first_number(answer: str, refs: Sequence[str]) -> float:
    """1 if the first run of digits is the reference (SCBench's pass keys)."""
    found = _DIGITS.search(answer)
    return float(found is not None and found[0] == refs[0])


def choice(answer: str, refs: Sequence[str]) -> float:
    """1 if the answer chooses the references, a letter of A to D and perhaps the option's text: a letter at its start,
    the text alone, either after "answer is", or a letter anywhere alone."""
    said = answer.strip()
    if said[:1] and said[0] in CHOICES:
        return float(said[0] in refs)
    if said in refs:
        return 1.0
    words = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", said))
    for lead in _CHOICE_LEADS:
        if (at := words.find(lead)) >= 0:
            return float(words[at + len(lead) + 1 :].startswith(tuple(refs)))
    alone = next((word for word in words.split() if word in CHOICES), None)
    return float(alone in refs)


def f1(answer: str, refs: Sequence[str]) -> float:
    """The best F1 of words over the references, without case, punctuation and articles."""
    return max(_f1(_words(answer), _words(ref)) for ref in refs)


def f1_characters(answer: str, refs: Sequence[str]) -> float:
    """The best F1 of characters, for languages without blanks; no case, punctuation or white space."""
    return max(_f1(_characters(answer), _characters(ref)) for ref in refs)


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def _characters(text: str) -> list[str]:
    return [c for c in text.lower() if c not in _PUNCTUATION and not c.isspace()]


SCORERS: dict[str, Scorer] = {
    "all": match_all,
    "any": match_any,
    "contains": contains,
    "number": number,
    "first_number": first_number,
    "choice": choice,
    "f1": f1,
    "f1_characters": f1_characters,
}


def score(scorer: str, answer: str, refs: Sequence[str]) -> float:
    """The score of an answer; scorer: a name in SCORERS. Raises ValueError for others, and for no references."""
    if scorer not in SCORERS:
        raise ValueError(f"unknown scorer {scorer!r}; choose from {', '.join(SCORERS)}")
    if not refs:
        raise ValueError("an answer needs at least one reference to be held against, got none")
    return SCORERS[scorer](answer, refs)
