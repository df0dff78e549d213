import dataclasses

import pytest

from retrieval_attn import RetrievalConfig
from retrieval_attn.config import INDEX_KINDS


def test_sizes_are_the_papers_and_the_index_chooses_itself():
    config = RetrievalConfig()
    assert (config.index, config.top_k, config.n_sink, config.n_local) == ("auto", 100, 128, 512)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RetrievalConfig().top_k = 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"index": "grpah"}, "index must be one of 'exact', 'ivf', 'graph', 'scan', 'page', 'auto', got 'grpah'"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 1.5}, "top_k must be an integer of at least 1, got 1.5"),
        ({"top_k": True}, "top_k must be an integer of at least 1, got True"),
        ({"n_sink": -1}, "n_sink must be an integer of at least 0, got -1"),
        ({"n_local": 0}, "n_local must be an integer of at least 1, got 0"),
        ({"effort": 0}, "effort must be an integer of at least 1, got 0"),
        ({"threads": 0}, "threads must be an integer of at least 1, got 0"),
        ({"build_queries": 0}, "build_queries must be an integer of at least 1, got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer of at least 1, got 0"),
        (
            {"prefill": "sparse"},
            "prefill must be one of 'auto', 'dense', .*, or the path of a .json file, got 'sparse'",
        ),
        ({"prefill_mass": 1}, "prefill_mass must be above 0 and below 1 .* got 1"),
        (
            {"prefill": "auto", "prefill_chunk": 511},
            "prefill_chunk must be at least 512 with prefill='auto', .* got 511",
        ),
        ({"dense_below": 0}, "dense_below must be an integer of at least 1, got 0"),
        ({"share_group": 1}, "share_group must be True or False, got 1"),
    ],
)
def test_bad_values_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**option)


def test_every_field_is_validated():
    """A nonsensical object is refused by every field, so a new field cannot forget its check."""
    for field in dataclasses.fields(RetrievalConfig):
        with pytest.raises(ValueError, match=field.name):
            RetrievalConfig(**{field.name: object()})


def test_unknown_field_is_an_error():
    with pytest.raises(TypeError, match="topk"):
        RetrievalConfig(topk=5)
    with pytest.raises(ValueError, match="unknown config field 'topk'; the fields are index, top_k"):
        RetrievalConfig.from_dict({"topk": 5})


def test_round_trip_through_plain_data():
    config = RetrievalConfig(index="ivf", top_k=7, threads=2)
    assert RetrievalConfig.from_dict(dataclasses.asdict(config)) == config


def test_every_kind_can_be_built():
    """The config and the index package must agree on what there is."""
    from retrieval_attn.index import INDEX_KINDS as BUILDABLE

    assert set(INDEX_KINDS) - {"auto"} == set(BUILDABLE)
