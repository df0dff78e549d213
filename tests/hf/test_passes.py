"""Forward passes: positions are given to models that take them, and a cache that is ignored is noticed."""

import pytest
import torch
from tiny_models import prompt_ids, tiny_model
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

import retrieval_attn as ra
from retrieval_attn.hf.passes import Passes


@pytest.fixture(autouse=True)
def _registered():
    ra.register()


def llama_cache():
    return ra.RetrievalCache(tiny_model("llama").config, ra.RetrievalConfig(index="exact"))


@torch.no_grad()
def test_a_model_that_ignores_the_cache_is_refused_by_name():
    sizes = {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    passes = Passes(OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)).eval(), llama_cache())
    with pytest.raises(ValueError, match="'openai-gpt' does not keep its tokens in the cache"):
        passes.logits(prompt_ids(20), 20)


@torch.no_grad()
def test_every_pass_says_where_its_tokens_stand():
    model = tiny_model("llama")
    passes, seen = Passes(model, llama_cache()), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    passes.read(prompt_ids(30), 70)
    passes.read(prompt_ids(40), 70)
    passes.logits(prompt_ids(1), 71)
    assert torch.equal(torch.cat(seen, dim=1), torch.arange(71)[None])
