"""Benchmark vectors have the properties of real ones, and real ones are what the model used."""

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from retrieval_attn.bench.vectors import capture as vectors_capture
from retrieval_attn.bench.vectors.adversarial import COPIES, GIANT
from retrieval_attn.bench.vectors.sources import (
    PROPERTIES,
    SOURCES,
    capture,
    load_capture,
    measure,
    properties_table,
    shaped,
    vectors,
)
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.llm import EMBEDDED, load

S, H, G, D = 6000, 8, 2, 128

MADE = [source for source in SOURCES if source != "real"]


def small(source, n_keys=900, seed=0, **changes):
    shape = {"H": 4, "G": 2, "D": 32, "n_prefill": 50, "n_heldout": 20, "dtype": torch.float32}
    return vectors(source, S=n_keys, seed=seed, **{**shape, **changes})


@pytest.fixture(scope="module")
def found():
    return shaped(S, H, G, D, n_prefill=200, n_heldout=40, seed=3)


@pytest.fixture(scope="module")
def captured():
    return capture(600, seed=1, n_heldout=24)


@pytest.mark.parametrize("source", MADE)
def test_shapes_and_dtype(source):
    made = small(source, dtype=torch.bfloat16)
    assert [tuple(x.shape) for x in made[:4]] == [(2, 900, 32), (4, 50, 32), (4, 20, 32), (2, 900, 32)]
    assert {x.dtype for x in made[:4]} == {torch.bfloat16}
    assert all(torch.isfinite(x).all() for x in made)
    assert made.runs.shape == (20,)
    assert (made.runs.diff() >= 0).all()


@pytest.mark.parametrize("source", MADE)
def test_the_seed_decides(source):
    a, b, c = (small(source, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.queries, c.queries)


@pytest.mark.parametrize("source", MADE)
@pytest.mark.parametrize("n_keys", [1, 63])
def test_short_contexts(source, n_keys):
    made = small(source, n_keys=n_keys, n_heldout=2)
    assert made.keys.shape == (2, n_keys, 32)
    assert all(torch.isfinite(x).all() for x in made)
    assert all(torch.isfinite(torch.tensor(value)) for value in measure(made).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_keys": 0}, "must be at least 1"),
        ({"H": 3}, "H must be a multiple of G"),
        ({"D": 24}, "D must be a multiple of 16"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    for source in ("shaped", "zeros"):
        with pytest.raises(ValueError, match=message):
            small(source, **change)


@pytest.mark.parametrize("source", ["Shaped", "real:x", "real:", "shaped:1", ""])
def test_unknown_sources_are_refused(source):
    with pytest.raises(ValueError, match=r"source must be one of real:<layer>, shaped, .*got"):
        small(source)


def test_promised_properties(found):
    properties = measure(found)
    assert list(properties) == list(PROPERTIES)
    assert 0.8 <= properties["top_mass"] <= 0.96
    assert 5 <= properties["distance_ratio"] <= 10
    assert properties["effective_rank"] <= 0.5
    assert properties["mean_share"] >= 0.2
    assert properties["neighbour_cosine"] >= 0.3 > abs(properties["random_cosine"]) + 0.2
    assert 0.05 <= properties["group_overlap"] <= 0.6
    assert 0.05 <= properties["consecutive_overlap"] <= 0.6


def test_top_mass_is_calibrated_for_each_head(found):
    for h in range(H):
        g = h * G // H
        one = found._replace(
            keys=found.keys[g : g + 1],
            queries=found.queries[h : h + 1],
            prefill_queries=found.prefill_queries[h : h + 1],
        )
        assert 0.7 <= measure(one)["top_mass"] <= 0.99


def test_held_out_queries_are_new_but_alike(found):
    asked, heldout = found.prefill_queries[0], found.queries[0]
    assert torch.cdist(heldout, asked).min() > 1e-3
    assert 0.8 < heldout.norm(dim=1).mean() / asked.norm(dim=1).mean() < 1.25


def test_neighbours_of_a_query_lie_apart(found):
    """A clustering of the keys must not find them: of the best 100, those of one passage of 256 are few."""
    best = (found.queries[0] @ found.keys[0].T).topk(100).indices
    passages = [len(set((row // 256).tolist())) for row in best]
    assert sum(passages) / len(passages) > S // 256 / 2


def test_consecutive_queries_want_much_the_same(found):
    """Decode steps of one run share more of their best keys than steps of different runs."""
    top = [set(row.tolist()) for row in (found.queries[0] @ found.keys[0].T).topk(100).indices]
    same = [len(top[t] & top[t + 1]) for t in range(39) if found.runs[t] == found.runs[t + 1]]
    other = [len(top[t] & top[t + 8]) for t in range(32)]
    assert sum(same) / len(same) > 1.5 * sum(other) / len(other)


def test_uniform_attention_is_flat():
    assert measure(small("uniform", n_keys=4000))["top_mass"] < 2 * 100 / 4000


def test_one_key_is_a_giant():
    norms = small("giant").keys.norm(dim=2)
    assert (norms.amax(1) > 0.5 * GIANT * norms.median(1).values).all()
    assert ((norms > 10 * norms.median()).sum(1) == 1).all()


def test_every_key_has_its_copies():
    made = small("duplicates", n_keys=1280)
    for keys in made.keys:
        distinct, counts = keys.unique(dim=0, return_counts=True)
        assert len(distinct) <= 1280 // COPIES
        assert (counts % COPIES == 0).all()
    assert len(made.values[0].unique(dim=0)) == 1280


def test_zero_keys_are_zero():
    assert not small("zeros").keys.any()


def test_queries_are_keys():
    made = small("self")
    for h in range(4):
        assert (made.queries[h][:, None] == made.keys[h // 2]).all(2).any(1).all()


def test_drifted_queries_are_unlike_the_prompts():
    """Both ask sharply, but what the late ones want was wanted by few of the early ones."""
    alike, drifted = (measure(small(source, n_keys=4000, D=64)) for source in ("shaped", "drift"))
    assert drifted["asked_cosine"] < 0.6 * alike["asked_cosine"]
    assert drifted["known_share"] < alike["known_share"]
    assert drifted["top_mass"] > 0.7


def test_a_capture_holds_what_the_stock_model_keeps(captured):
    """The keys and values of a stock run over the same document, bit for bit, without those that stay near."""
    script = vectors_capture._Script.written(load(None), 600 + 640, 1, None)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, attn_implementation="sdpa", dtype="auto").eval()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model.base_model(input_ids=torch.tensor([script.document]), **cache_argument(cache), use_cache=True)
    assert sorted(captured.layers) == [0, 1, 2]
    for i, layer in captured.layers.items():
        assert torch.equal(layer.keys, cache.layers[i].keys[0, :, 128:-512])
        assert torch.equal(layer.values, cache.layers[i].values[0, :, 128:-512])


def test_held_out_queries_find_the_facts(captured):
    """The model answers, and in layer 1 the first query of an answer looks at the fact that it is about."""
    assert captured.about["answered"] > 0.9
    layer = captured.layers[1]
    found = []
    for run in captured.runs.unique():
        t = int((captured.runs == run).nonzero()[0])
        best = int((layer.heldout[0, t].float() @ layer.keys[0].float().T).argmax())
        found.append(0 <= best - (int(captured.fact_at[t]) - captured.first_key) < 40)
    assert sum(found) > 0.7 * len(found)


def test_queries_are_kept_as_the_runtime_keeps_them(captured):
    """An even sample, then the last 256 tokens; all different."""
    assert captured.asked_at.tolist() == sorted(set(captured.asked_at.tolist()))
    assert captured.asked_at[-256:].tolist() == list(range(1240 - 256, 1240))
    assert captured.layers[0].asked.shape == (4, len(captured.asked_at), 64)


def test_fewer_keys_are_the_last_ones(captured):
    whole, part = captured.vectors(1), captured.vectors(1, S=400, n_prefill=30)
    assert torch.equal(part.keys, whole.keys[:, -400:])
    assert part.prefill_queries.shape == (4, 30, 64)
    n_kept = int((captured.fact_at >= captured.first_key + 200).sum())
    assert part.queries.shape[1] == n_kept < whole.queries.shape[1]
    assert captured.n_queries(400)[1] == n_kept


def test_a_capture_survives_its_file(captured, tmp_path):
    path = tmp_path / "some.safetensors"
    captured.save(path)
    read = load_capture(path)
    assert read.about == captured.about
    assert all(
        torch.equal(a, b) for i in captured.layers for a, b in zip(read.layers[i], captured.layers[i], strict=True)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            vectors("real:1", S=600, seed=0, captured=path, n_prefill=9, n_heldout=5, dtype=torch.float32),
            captured.vectors(1, n_prefill=9, n_heldout=5, dtype=torch.float32),
            strict=True,
        )
    )


def test_a_capture_leaves_transformers_as_it_was(captured):
    assert not any(name.startswith("watched") for name in AttentionInterface._global_mapping)


def test_text_of_ones_own():
    text = "The sea was calm that day. Nobody spoke of it. " * 400
    found = capture(300, seed=0, text=text, n_heldout=4)
    assert found.about["text"] == "a text file"
    assert found.layers[0].heldout.shape[1] == 4


def test_wrong_captures_are_refused(captured, tmp_path):
    with pytest.raises(ValueError, match=r'source must name a layer, such as "real:1"'):
        vectors("real", S=600, seed=0, captured=captured)
    with pytest.raises(ValueError, match="layer must be one of 0, 1, 2, got 7"):
        captured.vectors(7)
    with pytest.raises(ValueError, match="S must be between 1 and 600"):
        captured.vectors(0, S=601)
    with pytest.raises(ValueError, match="n_heldout must be between 1 and 24"):
        captured.vectors(0, n_heldout=25)
    with pytest.raises(ValueError, match="S must be between 192 and"):
        capture(100, seed=0)
    with pytest.raises(FileNotFoundError, match="no capture at"):
        load_capture(tmp_path / "missing")
    (tmp_path / "other").write_text("not a capture")
    with pytest.raises(ValueError, match="is not a capture"):
        load_capture(tmp_path / "other")


def test_the_table_has_a_column_per_source(captured):
    text = properties_table({"real:1": measure(captured.vectors(1)), "zeros": measure(small("zeros"))})
    assert text.startswith("| property | real:1 | zeros |")
    assert len(text.strip().split("\n")) == 2 + len(PROPERTIES)
