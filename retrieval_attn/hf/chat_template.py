"""Chat templates of models that see images: where they keep them, and the form in which they read what is said.

Many read a message only as a list of parts; of a plain text they would take nothing, without a word.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils import cached_file

Messages = list[dict[str, Any]]

# Who says what, to see whether a template passes it on.
_PROBE: Messages = [
    {"role": "user", "content": "QQQaskedQQQ"},
    {"role": "assistant", "content": "QQQansweredQQQ"},
    {"role": "user", "content": "QQQaskedagainQQQ"},
]


def stored_template(source: str) -> str | None:
    """The template of a folder or hub id that has one beside its tokenizer, as processors keep it; else None."""
    quietly = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    found = cached_file(source, "chat_template.json", **quietly)
    if found is None:
        return None
    held = json.loads(Path(found).read_text(encoding="utf-8"))
    template = held.get("chat_template") if isinstance(held, dict) else None
    if not isinstance(template, str):
        raise ValueError(f"{found} must hold one text named 'chat_template'")
    return template


def render_messages(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
    """Chat messages as text, through the tokenizer's template, as plain texts if it reads those.

    A message may come in parts. Raises ValueError for a part that is no text.
    """
    messages = [_in_one_text(message) for message in messages]
    if not _passes_on(tokenizer, _PROBE) and _passes_on(tokenizer, _in_parts(_PROBE)):
        messages = _in_parts(messages)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))


def _passes_on(tokenizer: Any, messages: Messages) -> bool:
    """Whether the template's text holds all that the messages say."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError):
        return False
    return all(message["content"] in text for message in _PROBE)


def _in_one_text(message: dict[str, Any]) -> dict[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"a message may hold text, as {{'type': 'text', 'text': '...'}}, got {str(part)[:60]}")
    return {**message, "content": "".join(part["text"] for part in parts)}


def _in_parts(messages: Messages) -> Messages:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else message
        for message in messages
    ]
