"""Pieces of text, joined, are the text: in every script, for byte-level and for byte-fallback tokenizers."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import examples
from tiny_models import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from retrieval_attn.detokeniser import Detokeniser, text_of

BROKEN = "\ufffd"

SCRIPTS = [
    st.text(st.characters(categories=("L", "M", "N", "P", "S", "Zs")), max_size=40),
    *(
        st.text(st.characters(min_codepoint=first, max_codepoint=last), max_size=40)
        for first, last in ((0x20, 0x7E), (0x590, 0x5FF), (0x900, 0x97F), (0xF40, 0xFBC), (0xA000, 0xA48C))
    ),
    st.text(st.characters(min_codepoint=0x20000, max_codepoint=0x2FA1D), max_size=40),
    st.lists(
        st.sampled_from(["👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭", "é", "e\u0301", "👍🏽", " ", "\n", "is it ,  that 's n't ?"])
    ).map("".join),
]


@functools.cache
def byte_fallback():
    """As of Llama 2, Mistral, Phi-3 and Gemma: what is no word is written byte by byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@functools.cache
def byte_level():
    return byte_tokenizer()


def pieces_of(tokenizer, ids):
    stream = Detokeniser(functools.partial(tokenizer.decode, skip_special_tokens=True))
    pieces = [stream.add(token) for token in ids]
    last = stream.flush()
    assert stream.text == "".join(pieces) + last
    return pieces, last


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("script", SCRIPTS)
def test_pieces_joined_are_the_text(make, script):
    tokenizer = make()

    @examples(30)
    @given(st.lists(script, min_size=1, max_size=8).map(" ".join))
    def law(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces, last = pieces_of(tokenizer, ids)
        assert "".join(pieces) + last == tokenizer.decode(ids, skip_special_tokens=True) == text

    law()


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_no_piece_is_half_a_character(make):
    """Of three bytes each, and long enough for the oldest tokens to be forgotten many times."""
    tokenizer = make()
    text = "".join(chr(0xA000 + i % 1000) for i in range(500))
    pieces, last = pieces_of(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert last == ""
    assert max(map(len, pieces)) == 1


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_an_answer_cut_within_a_character_keeps_those_before(make):
    tokenizer = make()
    ids = tokenizer.encode("ཀཁག", add_special_tokens=False)[:-1]
    pieces, last = pieces_of(tokenizer, ids)
    assert "".join(pieces).strip() == "ཀཁ"
    assert set(last) == {BROKEN}


@examples(100)
@given(st.lists(st.integers(3, 285), max_size=200))
def test_bytes_that_are_no_text(ids):
    """A model may say anything: nothing fails, and the text is what the pieces make up."""
    decode = functools.partial(byte_fallback().decode, skip_special_tokens=True)
    pieces, last = pieces_of(byte_fallback(), ids)
    assert "".join(pieces) + last == text_of(decode, ids)


@examples(100)
@given(st.lists(st.integers(0, 255), max_size=200))
def test_any_bytes_of_a_byte_level_tokenizer(ids):
    pieces, last = pieces_of(byte_level(), ids)
    assert "".join(pieces) + last == byte_level().decode(ids, skip_special_tokens=True)
