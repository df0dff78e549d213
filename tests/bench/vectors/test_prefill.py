"""Vectors of whole prompts: real ones are what the model is given, mixed heads look where they were asked to."""

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from retrieval_attn.bench.vectors import mixed as vectors_mixed
from retrieval_attn.bench.vectors.capture import _Script
from retrieval_attn.bench.vectors.marks import N_SINK, PARTS, Text, part_of
from retrieval_attn.bench.vectors.mixed import MIXES, Mix, mixed
from retrieval_attn.bench.vectors.prefill import check_source, prefill_vectors
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.kernels import reference
from retrieval_attn.llm import EMBEDDED, load

SMALL = {"H": 4, "G": 2, "D": 64, "dtype": torch.float32}


@pytest.mark.parametrize("source", ["shaped", "shaped_mixed"])
@pytest.mark.parametrize("S", [1, 63, 1000])
def test_shapes(source, S):
    made = prefill_vectors(source, S=S, seed=0, **{**SMALL, "dtype": torch.bfloat16})
    assert [tuple(x.shape) for x in made] == [(1, 4, S, 64), (1, 2, S, 64), (1, 2, S, 64)]
    assert all(x.dtype == torch.bfloat16 and x.is_contiguous() and x.isfinite().all() for x in made)


@pytest.mark.parametrize("source", ["shaped", "shaped_mixed"])
def test_the_seed_decides(source):
    a, b, c = (prefill_vectors(source, S=300, seed=seed, **SMALL) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_shaped_queries_retrieve_tokens_before_them():
    """The best hundred of 4000 keys hold most of the mass, and hardly any of it is nearby."""
    made = prefill_vectors("shaped", S=4000, seed=0, **SMALL)
    query, keys = made.query[0, :, -1000::50], made.keys[0].repeat_interleave(2, dim=0)
    weights = (query @ keys.mT / 8).softmax(-1)
    assert weights.topk(100).values.sum(-1).mean() > 0.6
    assert weights[..., -1000:].sum(-1).mean() < 0.5


@pytest.fixture(scope="module")
def found():
    """Mixed vectors with every kind of head, and of each its mass on each part and what was asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors_mixed, "_draw_kinds", lambda H, make: [*MIXES, *MIXES])
        texts = []
        patch.setattr(vectors_mixed, "Text", lambda *args: texts.append(Text(*args)) or texts[-1])
        made = mixed(8192, 8, 2, 128, 0, torch.bfloat16)
    positions = torch.arange(2000, 8192, 60)
    masses = []
    for h, head in enumerate(made.heads):
        scores = made.query[0, h, positions].float() @ made.keys[0, h // 4].float().T * 128**-0.5
        future = torch.arange(8192) > positions[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(1)
        shares = torch.zeros(len(positions), len(PARTS)).scatter_add_(
            1, part_of(head, texts[h // 4], positions), weights
        )
        masses.append(shares.mean(0))
    return made, torch.stack(masses), torch.tensor([head.mix for head in made.heads])


def test_every_head_looks_where_it_was_asked_to(found):
    """Shares of real inner products, rounded to bfloat16, of queries that the head was not fitted to."""
    _, got, asked = found
    assert (got - asked).abs().max() < 0.1
    assert (got - asked).abs().mean() < 0.03


def test_kinds_differ_in_what_they_are_named_for(found):
    made, got, _ = found
    assert [head.kind for head in made.heads] == [*MIXES, *MIXES]
    share = dict(zip(PARTS, got.T, strict=True))
    kind = {name: torch.tensor([head.kind == name for head in made.heads]) for name in MIXES}
    assert (share["topic"][kind["block_sparse"]] > 2 * share["topic"][~kind["block_sparse"]].max()).all()
    assert (share["retrieval"][kind["retrieval"]] > 2 * share["retrieval"][~kind["retrieval"]].max()).all()
    assert (share["sink"] + share["local"])[kind["a_shape"]].min() > 0.8
    assert (share["vertical"] + share["slash"])[kind["vertical_slash"]].min() > 0.15


def test_sinks_have_short_values(found):
    lengths = found[0].values[0].float().norm(dim=2)
    assert (lengths[:, :N_SINK] < 0.3 * lengths.mean()).all()


def test_shares_of_kinds_add_up():
    assert Mix._fields == ("heads", *PARTS)
    assert sum(mix.heads for mix in MIXES.values()) == pytest.approx(1)
    assert all(sum(mix[1:]) == pytest.approx(1) for mix in MIXES.values())


def test_kinds_are_drawn_in_proportion():
    drawn = vectors_mixed._draw_kinds(100, torch.Generator().manual_seed(0))
    assert {kind: drawn.count(kind) for kind in MIXES} == {kind: round(100 * mix.heads) for kind, mix in MIXES.items()}


def test_a_part_is_told_for_every_key():
    text = Text(3000, torch.Generator().manual_seed(0))
    head = text.draw_head("vertical_slash", MIXES["vertical_slash"][1:], torch.Generator().manual_seed(1))
    (parts,) = part_of(head, text, torch.tensor([2990]))
    names = [PARTS[i] for i in parts.tolist()]
    assert names[:4] == ["sink"] * 4
    assert names[2990 - 1023 : 2991] == ["local"] * 1024
    assert names[2991:] == ["retrieval"] * 9
    assert names[2990 - head.distance] == "slash" or text.hubs[2990 - head.distance] == head.family
    hubs = [i for i in range(4, 1900) if text.hubs[i] == head.family]
    assert {names[i] for i in hubs} == {"vertical"}


def test_a_real_layer_is_what_stock_attention_is_given():
    """Queries, keys and values of layer 1 give what stock transformers makes of layer 1, and keys are the cache's."""
    S = 1100
    made = prefill_vectors("real:1", S=S, seed=1, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, attn_implementation="sdpa", dtype="auto").eval()
    outputs = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = torch.tensor([_Script.written(load(None), S, 1, None).document])
        model.base_model(input_ids=ids, **cache_argument(cache), use_cache=True)
    assert torch.equal(made.keys, cache.layers[1].keys)
    assert torch.equal(made.values, cache.layers[1].values)
    out = reference.attend_dense(*made, made.query.shape[3] ** -0.5, causal=True).out
    stock = outputs[0].view(1, S, *made.query.shape[1::2]).transpose(1, 2)
    assert (out.float() - stock.float()).norm() < 1e-2 * stock.float().norm()


def test_reading_leaves_transformers_as_it_was():
    before = dict(AttentionInterface._global_mapping)
    prefill_vectors("real:0", S=1024, seed=0, dtype=torch.float32)
    assert dict(AttentionInterface._global_mapping) == before


def test_sources():
    assert check_source("real:2") == ("real", 2)
    assert check_source("shaped_mixed") == ("shaped_mixed", None)


@pytest.mark.parametrize("source", ["", "real", "real:", "real:x", "shaped:1", "mixed", "uniform"])
def test_sources_that_are_none(source):
    with pytest.raises(ValueError, match=r"source must be one of real:<layer>, shaped, shaped_mixed, got"):
        prefill_vectors(source, S=100, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"S": 0}, "must be at least 1"),
        ({"H": 3}, "H must be a multiple of G"),
        ({"D": 48}, "D must be a multiple of 32, and at least 64, for mixed heads, got 48"),
        ({"D": 32}, "D must be a multiple of 32, and at least 64"),
        ({"source": "real:9", "S": 2000}, "layer must be between 0 and 2, got 9"),
        ({"source": "real:0", "S": 100}, "S must be between 1024 and"),
    ],
)
def test_what_no_layer_has(change, message):
    with pytest.raises(ValueError, match=message):
        prefill_vectors(**{"source": "shaped_mixed", "S": 100, "seed": 0, **SMALL, **change})
