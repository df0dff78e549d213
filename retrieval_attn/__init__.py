"""Talk to a document of a million tokens with an unmodified open-weight model.

    import retrieval_attn as ra
    llm = ra.load()                                  # the small embedded model; or a folder, GGUF file, hub id
    session = llm.session()
    session.read(open("book.txt").read())
    print(session.ask("Who lives at the lighthouse?").text)

For your own transformers code: `register()`, `attn_implementation="retrieval"`, and a `RetrievalCache`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retrieval_attn.config import RetrievalConfig
from retrieval_attn.threads.waiting import let_threads_sleep

if TYPE_CHECKING:
    from retrieval_attn.generate import Completion
    from retrieval_attn.hf.attention import register, unregister
    from retrieval_attn.hf.cache import RetrievalCache
    from retrieval_attn.llm import LLM, load
    from retrieval_attn.session import Session

__version__ = "0.1.0"

__all__ = ["LLM", "Completion", "RetrievalCache", "RetrievalConfig", "Session", "load", "register", "unregister"]

# Imported on first use: `retrieval_attn.index` alone must not cost the start-up time of transformers.
_HOMES = {
    "LLM": "llm",
    "Completion": "generate",
    "RetrievalCache": "hf.cache",
    "Session": "session",
    "load": "llm",
    "register": "hf.attention",
    "unregister": "hf.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "load":
        # Before torch is imported, if it is not yet.
        let_threads_sleep()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
