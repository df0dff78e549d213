"""Layers that attend and have a recurrence, through transformers' own code."""

import pytest
import torch
from families import tiny
from family_sweep import config, prompt, sharpen, stock_model

import retrieval_attn as ra
from retrieval_attn.hf.attention import attend
from retrieval_attn.hf.hybrid_layer import HybridLayer
from retrieval_attn.hf.versions import KEEPS_RECURRENT_STATE, cache_argument

pytestmark = pytest.mark.skipif(not KEEPS_RECURRENT_STATE, reason="this transformers refuses recurrent layers")


@pytest.fixture(scope="module")
def models():
    """The same model twice: stock attention, and ours."""
    ra.register()
    stock = stock_model("falcon_h1")
    sharpen(stock)
    ours = stock_model("falcon_h1")
    ours.load_state_dict(stock.state_dict())
    ours.set_attn_implementation("retrieval")
    return stock, ours


def beams(model, ids, **options):
    return model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False, **options).tolist()


def test_beam_search_reorders_states_too(models):
    stock, ours = models
    cache = ra.RetrievalCache(ours.config, config())
    assert beams(ours, prompt(200), **cache_argument(cache)) == beams(stock, prompt(200))


@torch.no_grad()
def test_chosen_rows_go_on_as_themselves(models):
    stock, ours = models
    cache, rows = ra.RetrievalCache(ours.config, config()), prompt(200, batch=3)
    ours(rows, **cache_argument(cache))
    cache.batch_select_indices(torch.tensor([2, 0]))
    more = prompt(1, 5, batch=2)
    got = ours(more, **cache_argument(cache)).logits[:, -1]
    expected = stock(torch.cat([rows[[2, 0]], more], 1)).logits[:, -1]
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_a_cache_that_is_reset_begins_anew(models):
    _, ours = models
    cache = ra.RetrievalCache(ours.config, config())
    first = ours(prompt(100), **cache_argument(cache)).logits[:, -1]
    cache.reset()
    again = ours(prompt(100), **cache_argument(cache)).logits[:, -1]
    assert (first - again).abs().max() <= 1e-5 * first.abs().max()


@torch.no_grad()
def test_forks_do_not_share_a_state(models):
    _, ours = models
    cache = ra.RetrievalCache(ours.config, config())
    ours(prompt(100), **cache_argument(cache))
    assert all(isinstance(layer, HybridLayer) for layer in cache.layers)
    twin = cache.fork()
    before = twin.layers[0].recurrent_states[0].clone()
    ours(prompt(1), **cache_argument(cache))
    assert (twin.layers[0].recurrent_states[0] == before).all()
    assert (cache.layers[0].recurrent_states[0] != before).any()


def test_what_it_records_for_assisted_decoding_is_a_stock_layers():
    cache = ra.RetrievalCache(tiny("falcon_h1"), config())
    assert not cache.is_recording_past(0)
    cache.activate_past_recording()
    assert cache.is_recording_past(0)
    assert not cache.is_croppable


def test_a_bias_for_distance_is_refused_where_it_is_added():
    layer = ra.RetrievalCache(tiny("llama"), config()).layers[0]
    keys, values = layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    with pytest.raises(ValueError, match="bias for distance"):
        attend(None, torch.zeros(1, 4, 3, 16), keys, values, None, position_bias=torch.zeros(1, 4, 3, 3))
