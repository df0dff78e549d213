"""The one language of options: `top_k=200`, whether after --set, in `graph:top_k=200`, or after /set in a chat.

Its words are the fields of `RetrievalConfig` and `Sampling`. What a field is, takes and means is read from the
dataclass and its docstring, and written nowhere else.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from functools import cache
from inspect import cleandoc
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from retrieval_attn.config import ALLOWED
from retrieval_attn.terminal.units import BYTES, NUMBER, TOKENS, parse_count

T = TypeVar("T")

# What a number of each kind looks like.
_COUNTS = {"int": NUMBER, "tokens": TOKENS, "bytes": BYTES}

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Word:
    """An option by its name.

    name: as it is written, with underscores. field: of the dataclass, mostly the same. kind: "int", "tokens", "bytes",
    "float", "bool" or "str". allowed: the only values, if there are few. sentence: what it does. unset: what None
    means; empty if None is not a value.
    """

    name: str
    field: str
    kind: str
    default: Any
    allowed: tuple[str, ...]
    sentence: str
    unset: str

    def parse(self, text: str) -> Any:
        """The value that a text stands for; ValueError in one line. Ranges are left to the dataclass."""
        if self.unset and text.lower() == "none":
            return None
        if self.kind in _COUNTS:
            return parse_count(text, self.name, _COUNTS[self.kind])
        return _PARSERS[self.kind](self, text)


def _parse_float(word: Word, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{word.name} must be a number such as 0.98, got {text!r}") from None


def _parse_truth(word: Word, text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise ValueError(f"{word.name} must be true or false, got {text!r}")
    return _TRUTH[text.lower()]


def _parse_text(word: Word, text: str) -> str:
    if word.allowed and text not in word.allowed:
        rule = f"{word.name} must be one of {', '.join(map(repr, word.allowed))}, got {text!r}"
        raise ValueError("; ".join([rule, *did_you_mean(text, word.allowed)]))
    return text


_PARSERS: dict[str, Callable[[Word, str], Any]] = {"float": _parse_float, "bool": _parse_truth, "str": _parse_text}


@cache
def words_of(options: type) -> dict[str, Word]:
    """The words of a dataclass, by name, in the order of its fields."""
    docs, types = field_docs(options), get_type_hints(options, include_extras=True)
    words = [_word(field, types[field.name], docs.get(field.name, "")) for field in fields(options)]
    return {word.name: word for word in words}


def _word(field: Field[Any], annotation: Any, doc: str) -> Word:
    kinds = [one for one in (get_args(annotation) or (annotation,)) if one is not NoneType]
    return Word(
        name=field.metadata.get("option", field.name),
        field=field.name,
        kind=_kind(annotation if get_origin(annotation) is Annotated else kinds[0]),
        default=field.default,
        allowed=ALLOWED.get(field.name, ()),
        sentence=first_sentence(doc),
        unset=what_none_means(doc),
    )


def _kind(annotation: Any) -> str:
    """ "tokens" or "bytes" where the annotation names a unit, else the type's own name."""
    return str(annotation.__metadata__[0]) if get_origin(annotation) is Annotated else annotation.__name__


def field_docs(options: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field: entries `name: text`, further lines of which are indented."""
    names = "|".join(field.name for field in fields(options))
    found = re.findall(rf"^({names}): (.*(?:\n +.*)*)", cleandoc(options.__doc__ or ""), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def first_sentence(doc: str) -> str:
    """Up to the first full stop before a blank, beginning with a capital."""
    sentence = re.split(r"(?<=\.) ", doc, maxsplit=1)[0]
    return sentence[:1].upper() + sentence[1:]


def what_none_means(doc: str) -> str:
    """The sentence that begins with "None:", without this and the full stop; empty if there is none."""
    found = re.search(r"(?:^|\. )None: (.*?)\.(?: |$)", doc)
    return found[1] if found else ""


def parse_pairs(pairs: Iterable[str], words: Mapping[str, Word], where: str) -> dict[str, Any]:
    """Values by name from texts such as "top_k=200"; what `where` says begins the one line of an error.

    Raises ValueError for an unknown name, a wrong value, and two values for one name.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in words:
            raise ValueError(f"{where}: {unknown('option', name, tuple(words))}")
        if not equals:
            raise ValueError(f"{where}: {name} needs a value, as in {name}={words[name].default}")
        value = words[name].parse(text)
        if found.setdefault(name, value) != value:
            raise ValueError(f"{where}: {name} is given twice, as {found[name]} and as {value}")
    return found


def made(options: type[T], said: Mapping[str, Any], defaults: Mapping[str, Any]) -> T:
    """The dataclass from what was said, by word, and from defaults, by field. Its errors name words, too."""
    kind: type = options
    words = words_of(kind).values()
    own = {word.field: said[word.name] for word in words if word.name in said}
    try:
        return options(**{**defaults, **own})
    except ValueError as error:
        field, blank, rest = str(error).partition(" ")
        names = {word.field: word.name for word in words}
        raise ValueError(f"{names.get(field, field)}{blank}{rest}") from None


def split_pairs(texts: Iterable[str]) -> list[str]:
    """The pairs of "index=scan,top_k=200"; a comma that is no border may stand in a value."""
    return [pair for text in texts for pair in re.split(r",\s*(?=\w+=)", text.strip())]


def unknown(what: str, name: str, allowed: Sequence[str]) -> str:
    """What to say of a name that is none: those that come near, and all."""
    near = did_you_mean(name, allowed)
    hint = f"{near[0]} There" if near else "there"
    return f"unknown {what} {name!r}; {hint} are {', '.join(allowed)}"


def did_you_mean(name: str, allowed: Sequence[str]) -> list[str]:
    """A question, if anything comes near to the name."""
    near = get_close_matches(name, allowed, 3, 0.5)
    return [f"did you mean {' or '.join(near)}?"] if near else []
