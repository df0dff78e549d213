"""What differs between transformers versions is known in one place, and right for the version at hand."""

import logging
import warnings

import pytest
import torch
from tiny_models import prompt_ids, tiny_model
from transformers import DynamicCache

import retrieval_attn as ra
from retrieval_attn.hf.versions import CACHE_ARGUMENT, cache_argument, query_length


@pytest.mark.parametrize("call", ["forward", "base_model", "generate"])
def test_a_cache_is_handed_over_by_a_name_that_no_version_warns_of(caplog, monkeypatch, call):
    """transformers 5.24 warned in every forward pass, and says once only that it will stop."""
    ra.register()
    model = tiny_model("llama")
    cache = ra.RetrievalCache(model.config, ra.RetrievalConfig(n_sink=4, n_local=16))
    run = {"forward": model, "base_model": model.base_model, "generate": model.generate}[call]
    options = {"max_new_tokens": 2, "do_sample": False} if call == "generate" else {}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        run(prompt_ids(40), **cache_argument(cache), **options)
    assert cache.get_seq_length() >= 40
    assert not [record for record in caplog.records if "cache" in record.getMessage()]


def test_the_message_about_a_missing_cache_names_the_argument():
    ra.register()
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=f"pass it as {CACHE_ARGUMENT}=, or load"):
        model(prompt_ids(10), **cache_argument(DynamicCache(config=model.config)))


def test_the_number_of_new_tokens_is_read_from_both_forms():
    assert query_length(7) == query_length(torch.arange(3, 10)) == 7
