"""One prompt, one answer: what `retrieval-attn generate` does once a model is loaded."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from retrieval_attn.config import Sampling
from retrieval_attn.terminal.bar import PhaseBar
from retrieval_attn.terminal.shown import show_answer, stats_line

if TYPE_CHECKING:
    from retrieval_attn.generate import Completion
    from retrieval_attn.llm import LLM


def print_answer(
    llm: "LLM", text: str, sampling: Sampling, notes: Console, *, raw: bool, as_json: bool, stats: bool
) -> None:
    """Answer a prompt on standard output, with bars and statistics on `notes`.

    raw: the prompt stands as it is, also where the model has a chat template. as_json: text, token ids and statistics
    in the place of the text.
    """
    templated = bool(llm.tokenizer.chat_template) and not raw
    done = _answer(llm, text, sampling, notes, templated, silent=as_json)
    if as_json:
        print(json.dumps({"text": done.text, "token_ids": done.token_ids, "stats": done.stats.as_dict()}))
    else:
        print()
    if stats:
        notes.print(stats_line(done.stats), style="dim", highlight=False, soft_wrap=True)


def _answer(llm: "LLM", text: str, sampling: Sampling, notes: Console, templated: bool, silent: bool) -> "Completion":
    session = llm.session()
    try:
        with PhaseBar(notes, session) as bar:
            ids = llm.encode([{"role": "user", "content": text}] if templated else text)
            pieces = session.stream_answer(ids, on_progress=bar, **asdict(sampling))
            show_answer((lambda piece: None) if silent else _write, pieces, keep_blanks=not templated)
    finally:
        session.cache.cancel_builds()
    assert session.last is not None
    return session.last


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
