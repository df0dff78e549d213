"""Options of commands, made from dataclasses: a command asks for a config, and gets one.

    @app.command()
    @with_options
    def chat(config: RetrievalConfig, sampling: Annotated[Sampling, Fields(max_new_tokens=512)]) -> None: ...

`with_options` puts an option for every field in the place of such a parameter. It is one decorator over typer, and not
cyclopts or tyro, which do the like: either is a dependency more, and would have to be taught the units, the words for
None, --set and errors of one line all the same.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from retrieval_attn.config import DTYPES, WEIGHTS, RetrievalConfig, Sampling
from retrieval_attn.terminal.option_language import Word, made, parse_pairs, split_pairs, words_of

# The panels of the help, in this order, after that of a command's own options.
MODEL, RETRIEVAL, MEMORY, ANSWER, MORE = PANELS = ("Model", "Retrieval", "Memory", "Answer", "More retrieval options")

# Where a word is shown; one that is not here is shown last.
_COMMON = {
    RETRIEVAL: ("index", "top_k", "estimator", "mass", "n_sink", "n_local", "prefill", "followup", "threads"),
    MEMORY: ("kv_dtype", "kv_dir", "device_kv_budget", "max_tokens", "max_host_bytes"),
    ANSWER: ("max_new_tokens", "temperature", "top_p", "sample_top_k", "seed"),
}
_PANEL_OF = {name: panel for panel, names in _COMMON.items() for name in names}

_SHORT = {"max_new_tokens": "-n"}

SET = "Any option by its name, as in top_k=200,n_local=1k; may be repeated."


def option(text: str, *names: str, panel: str | None = None, default: str | None = None) -> Any:
    """What an option does, for `Annotated`. default: in words, where the value would not say it."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=True if default is None else default)


@dataclass(frozen=True)
class ModelOptions:
    """Which model is loaded, where to, and with which numbers; see `load`."""

    model: Annotated[
        str | None,
        option(
            "A folder, GGUF file or hub id of a language model; one that sees images serves text.",
            "--model",
            "-m",
            panel=MODEL,
            default="the embedded model",
        ),
    ] = None
    device: Annotated[str, option("auto, cpu, cuda, cuda:1 ...", "--device", panel=MODEL)] = "auto"
    dtype: Annotated[str, option(f"{', '.join(DTYPES)}.", "--dtype", panel=MODEL)] = "auto"
    weights: Annotated[str, option(f"{', '.join(WEIGHTS)}.", "--weights", panel=MODEL)] = "auto"
    rope: Annotated[
        str | None,
        option("Scale positions for longer texts: yarn:4, linear:2 ...", "--rope", panel=MODEL, default="as the model"),
    ] = None


class Fields:
    """Which fields of a dataclass become options of a command (all, if none is named), and which defaults differ there.

    rest: whether --set reaches the fields of a config that are not named, but for those that the command does without.
    """

    def __init__(self, *only: str, rest: bool = True, without: Sequence[str] = (), **defaults: Any) -> None:
        self.only, self.rest, self.without, self.defaults = only, rest, without, defaults

    def reaches(self, field: str) -> bool:
        """Whether the field can be said at all."""
        return self.shows(field) or (self.rest and field not in self.without)

    def shows(self, field: str) -> bool:
        """Whether the field has an option of its own."""
        return not self.only or field in self.only


@dataclass(frozen=True)
class _Bundle:
    """A parameter of a command that is a dataclass."""

    parameter: str
    kind: type
    asked: Fields

    @cached_property
    def words(self) -> dict[str, Word]:
        """The words of the option language that make it; none if its fields say themselves what their options are."""
        if self.kind not in (RetrievalConfig, Sampling):
            return {}
        every = words_of(self.kind).items()
        return {name: word for name, word in every if self.asked.reaches(word.field)}

    def options(self) -> Iterator[inspect.Parameter]:
        """What typer needs to know of each option."""
        for word in self.words.values():
            if self.asked.shows(word.field):
                panel = RETRIEVAL if self.asked.only else _PANEL_OF.get(word.name, MORE)
                yield option_of(word, self.asked.defaults.get(word.field, word.default), panel)
        if not self.words:
            types = get_type_hints(self.kind, include_extras=True)
            for field in filter(lambda one: self.asked.shows(one.name), fields(self.kind)):
                yield _parameter(field.name, types[field.name], self.asked.defaults.get(field.name, field.default))

    def make(self, given: Mapping[str, Any], said: Mapping[str, Any]) -> Any:
        """The dataclass, from the values of all options and of the words that were said."""
        if not self.words:
            own = {field.name: given[field.name] for field in fields(self.kind) if self.asked.shows(field.name)}
            return self.kind(**{**self.asked.defaults, **own})
        return made(self.kind, {name: said[name] for name in self.words if name in said}, self.asked.defaults)


def option_of(word: Word, default: Any, panel: str) -> inspect.Parameter:
    """The option of a word. It takes text, so that it reads what --set reads."""
    flag, is_switch = flag_of(word.name), word.kind == "bool"
    names = [f"{flag}/--no-{flag[2:]}"] if is_switch else [flag, *filter(None, [_SHORT.get(word.name)])]
    shown = typer.Option(
        *names,
        help=help_of(word),
        metavar=None if is_switch else metavar_of(word),
        rich_help_panel=panel,
        show_default=word.unset if default is None else True,
    )
    kind = bool if is_switch else str | None
    return _parameter(word.name, Annotated[kind, shown], default if is_switch else as_written(default))


def flag_of(name: str) -> str:
    """How a word is written on the command line."""
    return f"--{name.replace('_', '-')}"


def as_written(value: Any) -> str | None:
    """A value as a person writes it; None for None."""
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


def help_of(word: Word) -> str:
    """The first sentence of the field's documentation, and what may be chosen."""
    if not word.allowed:
        return word.sentence
    return f"{word.sentence.removesuffix('.')}: {', '.join(word.allowed[:-1])} or {word.allowed[-1]}."


def metavar_of(word: Word) -> str:
    """What stands for a value in a help text."""
    return {"kv_dir": "<folder>"}.get(word.name, "<name>" if word.kind == "str" else f"<{word.kind}>")


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field in the place of its dataclasses, and --set for all their words.

    A name that the command takes for itself is no word of its --set. What is wrong with an option is a ValueError of
    one line.
    """
    signature = inspect.signature(command, eval_str=True).parameters.values()
    bundles = [bundle for one in signature if (bundle := _bundle(one)) is not None]
    own = [one.replace(kind=one.KEYWORD_ONLY) for one in signature if _bundle(one) is None]
    taken = {one.name for one in own} | {one.name for bundle in bundles if not bundle.words for one in bundle.options()}
    words = {name: word for bundle in bundles for name, word in bundle.words.items() if name not in taken}

    def call(typer_context: typer.Context, **given: Any) -> None:
        typed = {name: given[name] for name in words if name in given and _was_typed(typer_context, name)}
        said = agreed(typed, given.get("settings") or (), words)
        bundled = {bundle.parameter: bundle.make(given, said) for bundle in bundles}
        command(**{one.name: given[one.name] for one in own}, **bundled)

    _present(call, command, [*own, *_options(bundles)])
    return call


def _bundle(parameter: inspect.Parameter) -> _Bundle | None:
    """The dataclass that a parameter asks for, if it does."""
    kind, *more = (
        get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else [parameter.annotation]
    )
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return None
    return _Bundle(parameter.name, kind, next((one for one in more if isinstance(one, Fields)), Fields()))


def _options(bundles: Sequence[_Bundle]) -> list[inspect.Parameter]:
    """The options of all dataclasses, and --set, in the order of the panels; what two of them ask for comes once."""
    found: dict[str, inspect.Parameter] = {}
    for bundle in bundles:
        for one in bundle.options():
            found[one.name] = _joined(found[one.name], one) if one.name in found else one
    if any(bundle.words and bundle.asked.rest for bundle in bundles):
        shown = typer.Option("--set", help=SET, metavar="<name=value>", rich_help_panel=RETRIEVAL)
        found["settings"] = _parameter("settings", Annotated[list[str] | None, shown], None)
    return sorted(found.values(), key=lambda one: [None, *PANELS].index(_info(one).rich_help_panel))


def _info(parameter: inspect.Parameter) -> Any:
    """What its annotation tells typer, if anything."""
    return get_args(parameter.annotation)[1] if get_origin(parameter.annotation) is Annotated else None


def _joined(first: inspect.Parameter, second: inspect.Parameter) -> inspect.Parameter:
    """One option for two dataclasses, such as the seed of index builds and of draws; it says what it is for either.

    Raises ValueError for a command whose dataclasses begin with different values: one option can show but one.
    """
    if first.default != second.default:
        raise ValueError(f"{first.name} has two defaults in one command, {first.default!r} and {second.default!r}")
    info = copy(_info(first))
    info.help = f"{info.help} {_info(second).help}"
    return first.replace(annotation=Annotated[get_args(first.annotation)[0], info])


def _said_in_full(parameter: inspect.Parameter) -> inspect.Parameter:
    """The option with its default as the last words of its help: typer would spend a line of its own on it."""
    info = copy(_info(parameter))
    if not isinstance(info, OptionInfo) or not (default := _default_in_words(info, parameter.default)):
        return parameter
    info.help, info.show_default = f"{info.help} Default: {default}.", False
    return parameter.replace(annotation=Annotated[get_args(parameter.annotation)[0], info])


def _default_in_words(info: OptionInfo, value: Any) -> str:
    """Empty if there is nothing to say."""
    if isinstance(info.show_default, str):
        return info.show_default
    if value is None or value is False or value is inspect.Parameter.empty:
        return ""
    # A switch that is on is said by its name, which stands where typer has defaults otherwise.
    return str(info.default).partition("/")[0] if value is True else str(value)


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def agreed(typed: Mapping[str, Any], settings: Sequence[str], words: Mapping[str, Word]) -> dict[str, Any]:
    """Values by name, from options that were typed and from what stands after --set.

    Raises ValueError if the two say different things of one name.
    """
    said = parse_pairs(split_pairs(settings), words, "--set")
    for name, text in typed.items():
        value = text if isinstance(text, bool) else words[name].parse(text)
        if said.setdefault(name, value) != value:
            raise ValueError(
                f"{flag_of(name)} and --set {name}=... contradict each other ({value} and {said[name]}); give one"
            )
    return said


def _present(call: Callable[..., None], command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Let typer see the command with these parameters, and its docstring with one line per paragraph."""
    context = inspect.Parameter("typer_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *map(_said_in_full, parameters)]
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    call.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    call.__name__, call.__module__ = command.__name__, command.__module__
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    vars(call)["__signature__"] = inspect.Signature(parameters)
