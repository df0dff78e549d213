import numpy as np
import pytest
from index_vectors import as_bfloat16
from laws import rarely

from retrieval_attn.config import INDEX_KINDS, RetrievalConfig
from retrieval_attn.far.index_choice import GRAPH_AFTER_STEPS, GRAPH_FROM, bytes_per_key, choose_index
from retrieval_attn.index import build_index

AUTO = RetrievalConfig(index="auto")


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free, in bytes."""

    def set_free(n):
        monkeypatch.setattr(
            "retrieval_attn.far.index_choice.psutil.virtual_memory", lambda: type("M", (), {"available": n})
        )

    set_free(1 << 50)
    return set_free


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_a_short_context_is_scanned_exactly_whatever_was_asked_for(kind, free):
    kind, reason = choose_index(RetrievalConfig(index=kind), 2047)
    assert kind == "exact"
    assert "2047 far keys are fewer than exact_below=2048" in reason


@pytest.mark.parametrize("kind", sorted(set(INDEX_KINDS) - {"auto"}))
def test_what_was_asked_for_is_taken(kind, free):
    assert choose_index(RetrievalConfig(index=kind), 10_000) == (kind, "asked for")


def test_auto_scans_and_builds_a_graph_only_for_long_documents_that_are_used_much(free):
    assert choose_index(AUTO, GRAPH_FROM, steps=0).kind == "scan"
    assert choose_index(AUTO, GRAPH_FROM - 1, steps=GRAPH_AFTER_STEPS).kind == "scan"
    kind, reason = choose_index(AUTO, GRAPH_FROM, steps=GRAPH_AFTER_STEPS)
    assert kind == "graph"
    assert f"{GRAPH_FROM} far keys and {GRAPH_AFTER_STEPS} steps" in reason


def test_auto_fits_into_memory(free):
    per_key = 32 * 8
    for kind, smaller in (("scan", "page"), ("page", "exact")):
        free(2 * 100_000 * per_key * bytes_per_key(kind, 128))
        assert choose_index(AUTO, 100_000, 32, 8, 128).kind == kind
        free(2 * 100_000 * per_key * bytes_per_key(kind, 128) - 1)
        choice = choose_index(AUTO, 100_000, 32, 8, 128)
        assert choice.kind == smaller
        assert "memory is short" in choice.reason


@pytest.mark.parametrize("dim", [128, *rarely(64)])
@pytest.mark.parametrize("kind", ["graph", "scan", "page"])
def test_the_bytes_foretold_are_about_those_taken(kind, dim):
    rng = np.random.default_rng(0)
    keys = as_bfloat16(rng.standard_normal((1, 20_000, dim), np.float32))
    index = build_index(kind, keys, rng.standard_normal((2, 200, dim), np.float32))
    assert 0.5 * index.nbytes < 20_000 * bytes_per_key(kind, dim) < 1.5 * index.nbytes
