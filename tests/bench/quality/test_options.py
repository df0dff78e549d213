"""What a quality benchmark was asked for: methods get the config, and the report says what was changed in it."""

from dataclasses import replace

import pytest

from retrieval_attn.bench.quality.options import Asked, make_settings
from retrieval_attn.bench.quality.runner import parse_methods
from retrieval_attn.bench.shared.options import ReportTo, WholeModel, config_as_dict
from retrieval_attn.config import RetrievalConfig

CONFIG = RetrievalConfig(top_k=20, followup="retrieve", seed=3, threads=2)


def settings(config=CONFIG, **asked):
    return make_settings("ruler", replace(Asked(), **asked), WholeModel(device="cpu"), config, tasks=["vt"])


def test_methods_begin_with_the_config():
    scan, graph = parse_methods(settings(replace(CONFIG, n_local=64), method="scan,graph:n_local=1k:top_k=7"))
    assert scan.config == replace(CONFIG, n_local=64, index="scan")
    assert graph.config == replace(CONFIG, n_local=1024, top_k=7, index="graph")


def test_the_report_has_the_options_and_what_else_was_changed():
    plain = settings().as_dict()
    assert plain | {"top_k": 20, "followup": "retrieve", "seed": 3, "threads": 2, "tasks": ["vt"]} == plain
    assert settings(replace(CONFIG, n_local=64)).as_dict() == plain | {"n_local": 64}
    assert plain["contexts"] == [8192, 32768]


def test_a_config_as_plain_data():
    assert config_as_dict(RetrievalConfig(), "top_k", "threads") == {"top_k": 100, "threads": None}
    assert config_as_dict(RetrievalConfig(n_local=64), "top_k") == {"top_k": 100, "n_local": 64}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: settings(method=" , "), "--method names no method"),
        (lambda: settings(context="8q"), "--context must be tokens such as 8k"),
        (lambda: settings(samples=0), "--samples must be at least 1"),
        (lambda: settings(limit=0), "--limit must be at least 1"),
        (lambda: WholeModel(device="tpu"), "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (lambda: WholeModel(dtype="int3"), "--dtype must be one of auto, float32"),
        (lambda: ReportTo(form="xml"), "--output must be one of md, json, csv"),
    ],
)
def test_what_cannot_be_is_one_line(make, says):
    with pytest.raises(ValueError, match=says):
        make()
