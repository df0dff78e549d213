"""Methods by name, with options: `graph:top_k=200:followup=exact` is one of ours, `quantized:bits=2` one of stock's."""

from dataclasses import dataclass, replace

from retrieval_attn.bench.methods.names import METHODS, OURS, STOCK
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.hf.cache import KEPT_BY_FORKS
from retrieval_attn.terminal.option_language import Word, parse_pairs, unknown, words_of

WEIGHTS = ("int8", "int4")

# Of quantised keys and values.
BITS = ("2", "4", "8")

# Options of methods beside the words of `RetrievalConfig`, and which methods take them.
_OTHER = {
    "weights": Word("weights", "weights", "str", "auto", ("auto", *WEIGHTS), "", ""),
    "bits": Word("bits", "bits", "str", "4", BITS, "", ""),
    "backend": Word("backend", "backend", "str", "hqq", (), "", ""),
}
_TAKERS = {"weights": (*OURS, *STOCK), "bits": ("quantized",), "backend": ("quantized",)}


@dataclass(frozen=True)
class Method:
    """A method and its options. label: as the user wrote it; two methods of one run differ in it."""

    label: str
    name: str
    config: RetrievalConfig
    weights: str = "auto"
    options: tuple[tuple[str, str], ...] = ()

    @property
    def shares_prefill(self) -> bool:
        """Whether it goes on from an exact prefill by the same weights, kept as that one keeps it."""
        plain = RetrievalConfig()
        same = all(getattr(self.config, name) == getattr(plain, name) for name in KEPT_BY_FORKS)
        return self.weights == "auto" and same


def parse_method(text: str, config: RetrievalConfig) -> Method:
    """A method from NAME or NAME:OPTION=VALUE:..., options of `config` first.

    Raises ValueError naming what is unknown, with what comes near to it.
    """
    name, *pairs = text.strip().split(":")
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    words = _words_of(name)
    said = parse_pairs(pairs, words, f"method {name!r} in {text!r}")
    others = {option: str(said.pop(option)) for option in _OTHER if option in said}
    weights = others.pop("weights", "auto")
    if name in OURS:
        said["index"] = "auto" if name == "hnsw" else name
    return Method(text.strip(), name, replace(config, **said), weights, tuple(others.items()))


def _words_of(name: str) -> dict[str, Word]:
    """What a method takes: the config's words if it is ours, those of the window if it streams, and its own."""
    others = {option: word for option, word in _OTHER.items() if name in _TAKERS[option]}
    if name not in (*OURS, "streaming"):
        return others
    words = {option: word for option, word in words_of(RetrievalConfig).items() if option != "index"}
    return others | (words if name in OURS else {option: words[option] for option in ("n_sink", "n_local")})
