import json
import logging

import pytest
import torch

from retrieval_attn.attention import break_even as module
from retrieval_attn.attention.break_even import LEAST, NEVER, break_even, cache_file, crossing
from retrieval_attn.kernels import attend_adaptive

ASKED = (4, 2, 16, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    break_even.cache_clear()
    yield
    break_even.cache_clear()


@pytest.mark.parametrize(
    ("lead", "tokens"),
    [
        ((-1.0, 1.0), 200), ((-1.0, 0.0), 300), ((1.0, 3.0), 0), ((-3.0, -1.0), 400), ((-1.0, -1.0), NEVER),
        ((2.0, 1.0), 0),
    ],
)  # fmt: skip
def test_where_the_lines_cross(lead, tokens):
    assert crossing((100, 300), lead) == tokens


def test_measured_once_and_kept(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "measure", lambda *shape: asked.append(shape) or 20_000)
    assert break_even(*ASKED) == 20_000
    break_even.cache_clear()
    assert break_even(*ASKED) == 20_000
    assert asked == [ASKED]
    ((key, tokens),) = json.loads(cache_file().read_text()).items()
    assert tokens == 20_000
    assert "4/2 heads of 16" in key
    break_even(8, *ASKED[1:])
    assert len(asked) == 2


def test_never_below_the_least(monkeypatch):
    """Whether measured or read."""
    monkeypatch.setattr(module, "measure", lambda *shape: -5)
    assert break_even(*ASKED) == LEAST
    break_even.cache_clear()
    assert break_even(*ASKED) == LEAST


def test_what_others_have_measured_meanwhile_is_kept(monkeypatch):
    def slow(*shape):
        module._keep("another", 7)
        return 30_000

    monkeypatch.setattr(module, "measure", slow)
    break_even(*ASKED)
    assert sorted(json.loads(cache_file().read_text()).values()) == [7, 30_000]
    assert [path.name for path in cache_file().parent.iterdir()] == [cache_file().name]


def test_another_number_of_threads_is_another_device(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "measure", lambda *shape: asked.append(shape) or 20_000)
    for n in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        break_even.cache_clear()
        break_even(*ASKED)
    assert len(asked) == 2


def test_what_is_timed_is_sparse_where_it_should_be():
    inputs = module.wanting_some(2, 1, 16384, 64, torch.bfloat16, torch.device("cpu"))
    kinds = module.dearest(torch.device("cpu"))
    _, choices = attend_adaptive(*inputs, mass=0.9, kinds=kinds)
    assert {choice.kind for choice in choices} == {kinds[-1]}
    assert all(0.9 * module.DENSITY < choice.density < 2 * module.DENSITY for choice in choices)


def test_a_real_measurement_on_this_machine():
    assert 0 <= module.measure(*ASKED) <= NEVER


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"a": "x"}', "\x00", '{"a": Infinity}', '{"a": 1e400}', "[" * 100_000, '{"a": null}']
)
def test_a_spoiled_cache_is_said_and_made_anew(monkeypatch, caplog, content):
    monkeypatch.setattr(module, "measure", lambda *shape: 30_000)
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    with caplog.at_level(logging.WARNING):
        assert break_even(*ASKED) == 30_000
    assert "measured anew" in caplog.text
    assert 30_000 in json.loads(cache_file().read_text()).values()


def test_a_cache_that_cannot_be_written_is_said_and_nothing_is_lost(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(module, "measure", lambda *shape: 30_000)
    (tmp_path / "retrieval-attn").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert break_even(*ASKED) == 30_000
    assert "cannot be kept" in caplog.text
