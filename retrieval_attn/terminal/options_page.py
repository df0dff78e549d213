"""Every option with its sentence, as Markdown: docs/options.md, and what `retrieval-attn options` prints."""

from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.terminal.option_language import Word, words_of
from retrieval_attn.terminal.options import as_written, flag_of, help_of, metavar_of

INTRODUCTION = """# Options

`retrieval-attn options` prints this page. It is made from the documentation of `RetrievalConfig` and `Sampling`
(`help(retrieval_attn.RetrievalConfig)` says more of each), and a test compares the two.

An option may be said in four ways, which are read by one parser:

    retrieval-attn generate --top-k 200 --n-local 1k ...             a flag
    retrieval-attn generate --set top_k=200,n_local=1k ...           its name, on any command that has --set
    retrieval-attn bench needle --method graph:top_k=200,scan        for one method of a benchmark
    /set temperature=0.7                                             in a chat, for answers

Whole numbers may have a unit: `k`, `m` and `g` are 1024, 1024 k and 1024 m, so that `32k` are 32768 tokens and `1.5g`
are bytes. A switch is `true` or `false`, or `--name` and `--no-name`. A default in words is written `none`. A command
has flags for what it is about; where it has --set, this reaches the others."""

ANSWERS = "The defaults are those of `LLM.generate`; `chat` and `generate` take up to 512 new tokens."


def options_page() -> str:
    """The page, with a line break at its end."""
    parts = [INTRODUCTION, "## Retrieval", _list(RetrievalConfig), "## Answers", ANSWERS, _list(Sampling)]
    return "\n\n".join(parts) + "\n"


def _list(options: type) -> str:
    return "\n".join(_entry(word) for word in words_of(options).values())


def _entry(word: Word) -> str:
    value = "" if word.kind == "bool" else f" {metavar_of(word)}"
    default = as_written(word.default) or word.unset
    return f"- `{flag_of(word.name)}{value}`: {help_of(word)} Default: {default}."
