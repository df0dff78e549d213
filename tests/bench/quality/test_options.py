"""What a quality benchmark was asked for: methods get the config, and the report says what was changed in it."""

from dataclasses import replace

import pytest

from retrieval_attn.bench.quality.measure import parse_methods
from retrieval_attn.bench.quality.options import Asked, make_settings
from retrieval_attn.bench.shared.options import ReportTo, WholeModel, config_as_dict
from retrieval_attn.config import RetrievalConfig

CONFIG = RetrievalConfig(top_k=20, followup="retrieve", seed=3, threads=2)


def settings(config=CONFIG, **asked):
    return make_settings("ruler", replace(Asked(), **asked), WholeModel(device="cpu"), config, tasks=["vt"])


def test_methods_begin_with_the_config():
    scan, graph = parse_methods(settings(replace(CONFIG, n_local=64), method="scan,graph:n_local=1k:top_k=7"))
    assert scan.config == replace(CONFIG, n_local=64, index="scan")
    assert graph.config == replace(CONFIG, n_local=1024, top_k=7, index="graph")


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("scan:kv_dir=/a,b", ("scan:kv_dir=/a,b",)),
        ("full, scan:kv_dir=/my files,b , graph:top_k=7,full,", ("full", "scan:kv_dir=/my files,b", "graph:top_k=7")),
        ("scan:kv_dir=/a,b:top_k=7,streaming:n_local=1k", ("scan:kv_dir=/a,b:top_k=7", "streaming:n_local=1k")),
        # A slip is still that of a method's name.
        ("graph:top_k=7,scna", ("graph:top_k=7", "scna")),
        ("graph:estimator=topk,scna", ("graph:estimator=topk", "scna")),
    ],
)
def test_a_comma_may_stand_in_a_text(text, methods):
    assert settings(method=text).methods == methods


def test_a_folder_keeps_its_commas_and_blanks():
    scan, full = parse_methods(settings(method="scan:kv_dir=/my files,b:top_k=7,full"))
    assert (scan.config.kv_dir, scan.config.top_k, full.name) == ("/my files,b", 7, "full")


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
