"""What a command does before its work: read texts and a prompt, load a model, open a session, show that it waits."""

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from retrieval_attn.config import DTYPES, RetrievalConfig
from retrieval_attn.terminal.files import is_a_person, is_session, read_text
from retrieval_attn.terminal.options import ModelOptions

if TYPE_CHECKING:
    from retrieval_attn.llm import LLM
    from retrieval_attn.session import Session


def read_texts(files: Sequence[Path] | None) -> dict[str, str]:
    """The texts of files, by name; see `read_text`."""
    return {str(path): read_text(str(path)) for path in files or []}


def read_prompt(prompt: str | None, texts: dict[str, str]) -> str:
    """The texts and the prompt, a blank line between them, or standard input if there is neither.

    Raises ValueError if nothing is said.
    """
    parts = [*texts.values(), *([prompt] if prompt is not None else [])]
    if not parts:
        if is_a_person():
            raise ValueError("there is no prompt; give one as an argument, with --file, or on standard input")
        parts = [sys.stdin.read()]
    text = "\n\n".join(parts)
    if not text.strip():
        raise ValueError("the prompt is empty; say something")
    return text


def load_model(notes: Console, asked: ModelOptions, config: RetrievalConfig) -> "LLM":
    """The model that was asked for, with a spinner on `notes` until it is there."""
    if asked.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {asked.dtype!r}")
    if Path(asked.model or "").expanduser().exists():
        # Nothing is downloaded.
        hide_bars()
    with waiting(notes, f"loading {asked.model or 'the embedded model'}"):
        quiet_transformers()
        from retrieval_attn.llm import load

        return load(asked.model, config, device=asked.device, dtype=asked.dtype, weights=asked.weights, rope=asked.rope)


def open_session(llm: "LLM", folder: Path | None, system: str | None, notes: Console) -> "Session":
    """The session saved in `folder`, if there is one, else a new one."""
    if folder is None or not is_session(folder):
        return llm.session(system)
    with waiting(notes, f"loading {folder}"):
        restored = llm.restore(folder)
    if system is not None and system != restored.system:
        raise ValueError(f"the session in {folder} has its own system message; leave --system away")
    said = f"loaded {folder}: {len(restored.token_ids)} tokens, {len(restored.messages)} messages"
    notes.print(said, style="dim", markup=False, highlight=False, soft_wrap=True)
    return restored


def waiting(console: Console, what: str) -> AbstractContextManager[Any]:
    """A spinner, where someone sees it."""
    return console.status(what) if console.is_terminal else nullcontext()


def hide_bars() -> None:
    """No bars of tqdm, if it is not imported yet; the one of transformers' reader of GGUF files obeys nothing else."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def quiet_transformers() -> None:
    """No warnings and no bars of transformers; downloads keep theirs."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()
