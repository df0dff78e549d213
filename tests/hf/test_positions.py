"""How long a text may be, as a config says it, and scaled positions beside stock transformers with the same config."""

import logging

import pytest
import torch
from tiny_models import COMMON, prompt_ids, save_tiny_chat_model, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

import retrieval_attn as ra
from retrieval_attn.generate import longest_context
from retrieval_attn.hf.positions import made_for, scaled_positions

SHORT = COMMON["max_position_embeddings"]
EVERYTHING = ra.RetrievalConfig(index="exact", top_k=1 << 20, n_sink=4, n_local=16, exact_below=0)


def llama(said, **rope):
    return LlamaConfig(**COMMON | {"max_position_embeddings": said}, rope_scaling=rope or None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (llama(40_960), 40_960),
        (llama(40_960, rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768), 131_072),
        (llama(131_072, rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768), 131_072),
        (
            llama(
                131_072,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            131_072,
        ),
        # The factor may be in it already, as in Gemma-3, or not.
        (llama(16_384, rope_type="linear", factor=4.0), 16_384),
        (tiny_config("gemma3"), SHORT),
    ],
)
def test_a_text_may_be_as_long_as_the_config_says_with_its_scaling(config, expected):
    assert made_for(config) == expected


@pytest.mark.parametrize("said", ["yarn:4", "linear:2", "dynamic:2"])
def test_the_length_is_that_of_the_config_times_the_factor(said):
    config = llama(1000)
    scaled = scaled_positions(config, said)
    assert made_for(scaled) == 1000 * int(said[-1])
    assert made_for(config) == 1000


def test_of_a_hybrid_the_layers_with_a_window_stay():
    before, after = tiny_config("gemma3"), scaled_positions(tiny_config("gemma3"), "yarn:2")
    if not hasattr(before, "rope_parameters"):
        pytest.skip("before transformers 5, one set of parameters is for all layers")
    assert after.rope_parameters["sliding_attention"] == before.rope_parameters["sliding_attention"]
    assert after.rope_parameters["full_attention"]["rope_type"] == "yarn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model for texts of 128 tokens."""
    folder = save_tiny_chat_model(tmp_path_factory.mktemp("short"))
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 128
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("said", ["yarn:2", "linear:2"])
def test_scaled_is_stock_with_such_a_config(folder, said):
    kind, factor = said.split(":")
    config = AutoConfig.from_pretrained(folder)
    where = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"
    asked = {"rope_type": kind, "factor": float(factor), "original_max_position_embeddings": 128}
    setattr(config, where, {**(getattr(config, where) or {}), **asked})
    stock = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = prompt_ids(200)
    expected = stock.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 200:].tolist()
    scaled = ra.load(folder, EVERYTHING, dtype="float32", rope=said)
    assert scaled.max_tokens == 256
    assert scaled.generate(ids, max_new_tokens=20).token_ids == expected
    plain = ra.load(folder, ra.RetrievalConfig(**{**vars(EVERYTHING), "max_tokens": 256}), dtype="float32")
    assert plain.generate(ids, max_new_tokens=20).token_ids != expected


def test_more_tokens_than_the_model_was_made_for_are_allowed_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "retrieval_attn"):
        llm = ra.load(folder, ra.RetrievalConfig(max_tokens=300), dtype="float32")
    assert llm.max_tokens == 300
    assert "max_tokens=300 is more than the 128 tokens that the model was made for" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "retrieval_attn"):
        assert ra.load(folder, ra.RetrievalConfig(max_tokens=100), dtype="float32").max_tokens == 100
    assert "made for" not in caplog.text


def test_a_window_that_counts_as_none_is_the_longest_text():
    config = tiny_config("phi3")
    limited = ra.RetrievalConfig(max_tokens=10 * config.sliding_window)
    assert longest_context(config, limited, torch.float32) == config.sliding_window > SHORT


@pytest.mark.parametrize("said", ["yarn", "yarn:1", "yarn:x", "ntk:2", "linear:100", ""])
def test_other_words_are_refused(said):
    with pytest.raises(ValueError, match=r"rope must be yarn:FACTOR, linear:FACTOR, dynamic:FACTOR, 1 < FACTOR <= 64"):
        scaled_positions(llama(1000), said)


def test_what_cannot_be_scaled_is_refused_by_name():
    with pytest.raises(ValueError, match="'gpt2' has no rotary embeddings to scale"):
        scaled_positions(GPT2Config(), "yarn:2")
    twice = llama(1000, rope_type="linear", factor=2.0)
    with pytest.raises(ValueError, match=r"'llama' scales its positions already \(linear\)"):
        scaled_positions(twice, "yarn:2")
