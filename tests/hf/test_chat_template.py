"""Chats with models whose templates are in a file of their own, or read messages as lists of parts."""

import json

import pytest
from tiny_models import CHAT_TEMPLATE, byte_tokenizer, save_tiny_chat_model

import retrieval_attn as ra
from retrieval_attn.hf.chat_template import render_messages

# As LLaVA's and SmolVLM's: of a plain text they take nothing.
PARTS = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}",
)

# As Idefics': a plain text is an error.
STRICT = CHAT_TEMPLATE.replace("m['content']", "'' ~ m['content'][0]['text'].strip()")

# As Pixtral's: a user may speak in parts, an assistant may not.
EITHER = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% elif m['role'] == 'user' %}"
    "{{ m['content'][0]['text'] }}{% else %}{{ raise_exception('no parts') }}{% endif %}",
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "And you?"},
]


@pytest.mark.parametrize("template", [PARTS, STRICT, EITHER])
def test_every_template_is_given_what_it_reads(template):
    want = render_messages(byte_tokenizer(), CHAT, add_generation_prompt=True)
    assert render_messages(byte_tokenizer(template), CHAT, add_generation_prompt=True) == want
    assert want.endswith("<|user|>And you?<|end|><|assistant|>")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS])
def test_a_message_may_come_in_parts_of_text(template):
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    tokenizer = byte_tokenizer(template)
    assert render_messages(tokenizer, [{"role": "user", "content": parts}], False) == "<|user|>Who?<|end|>"
    for other in ({"type": "image", "url": "ship.png"}, {"type": "text"}, "Who?"):
        with pytest.raises(ValueError, match="a message may hold text, as .*, got "):
            render_messages(tokenizer, [{"role": "user", "content": [*parts, other]}], False)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS])
def test_a_template_in_a_file_of_its_own_is_read(tmp_path, template):
    folder = save_tiny_chat_model(tmp_path / "plain", chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    usual = ra.load(save_tiny_chat_model(tmp_path / "usual"))
    llm = ra.load(folder)
    assert llm.encode(CHAT) == usual.encode(CHAT)
    one, other = llm.session("Be brief."), usual.session("Be brief.")
    for question in ("Who?", "And you?"):
        assert one.ask(question, max_new_tokens=4).token_ids == other.ask(question, max_new_tokens=4).token_ids
    assert one.token_ids == other.token_ids


def test_a_broken_template_file_is_said_in_one_line(tmp_path):
    folder = save_tiny_chat_model(tmp_path / "plain", chat_template=None)
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer at .* cannot be loaded: "):
        ra.load(folder)
