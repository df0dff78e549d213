"""The GPU check, rehearsed on a CPU: it goes all the way, finds what is wrong, and ends in time."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from laws import rarely

import retrieval_attn
from retrieval_attn.attention import to_device as stream
from retrieval_attn.attention.to_device import reserve
from retrieval_attn.bench.gpu_check import capped as gpu_capped
from retrieval_attn.bench.gpu_check import cases as gpu_cases
from retrieval_attn.bench.gpu_check import correct as gpu_correct
from retrieval_attn.bench.gpu_check import end_to_end as gpu_end_to_end
from retrieval_attn.bench.gpu_check import measure as gpu_measure
from retrieval_attn.bench.gpu_check import planned as gpu_planned
from retrieval_attn.bench.gpu_check import streamed as gpu_streamed
from retrieval_attn.bench.gpu_check.cases import GIB, CappedCase, Rates
from retrieval_attn.bench.gpu_check.command import default_out
from retrieval_attn.bench.gpu_check.correct import cases, check_all
from retrieval_attn.bench.gpu_check.measure import SHARES, TINY, Budget
from retrieval_attn.bench.kernels.rows import Limits
from retrieval_attn.cli import main
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.generate import follow_builds
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.kernels import AttentionState, attend_near, attend_sparse, merge
from retrieval_attn.plan.terms import CUDA_CONTEXT

# Long enough for an index, which a far context of fewer than 2048 keys would not have.
LONG = 3000

CASES = (
    CappedCase(LONG, "dense", chunk=1024),
    CappedCase(LONG, "vertical_slash", 0, decode_cap=16 * GIB, kv_dtype="int8"),
)

SMALL = TINY._replace(lengths=(520,), prompts=(900,), chunk=256, capped=CASES)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(gpu_measure.machine, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(gpu_measure, "peak_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr("retrieval_attn.bench.kernels.measure_steps.CALLS", 2)
    monkeypatch.setattr(gpu_capped, "STEPS", 3)
    monkeypatch.setattr(gpu_capped, "WARM_STEPS", 1)


def call(words):
    """The exit status of the command, as a user meets it."""
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "gpu-check", *words])
    return leaving.value.code or 0


def rows_of(names, **wrong):
    """Rows of the small cases whose names begin so, with some functions replaced by wrong ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in wrong.items():
            patch.setattr(gpu_correct, name, function)
        chosen = [case for case in cases("cpu", 0, (64,)) if case.name.startswith(names)]
        return list(check_all(chosen, lambda: 1.0))


def test_a_rehearsal_goes_all_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_measure, "TINY", SMALL)
    out = tmp_path / "rows.json"
    assert call(["--dry-run", "-o", str(out)]) == 0
    report = json.loads(out.read_text())
    printed = capsys.readouterr().out.strip().split("\n")
    assert json.loads(printed[-1]) == report["results"]
    assert set(report) == {"schema_version", "bench", "env", "config", "results", "notes"}
    assert report["bench"] == "gpu_check"
    assert {"git", "packages", "gpu", "gpu_driver", "matmul_flops_per_s"} <= set(report["env"])
    parts = {row["part"] for row in report["results"]}
    assert parts == {"correctness", "under a cap", "end to end", "prefill", "decode"}
    methods = {row["method"] for row in report["results"]}
    assert {f"prefill, {name}" for name in gpu_streamed.WAYS} | {case.name for case in CASES} <= methods
    assert {row["status"] for row in report["results"]} == {"ok"}


def test_every_kernel_in_every_dimension_and_dtype():
    names = {case.name for case in cases("cpu", 0)}
    assert len(names) == 4 * 3 * 4
    for D in (64, 96, 128, 256):
        for dtype in ("float16", "bfloat16", "float32"):
            for kernel in ("sparse", "near", "near, masked", "merge"):
                assert f"{kernel} D={D} {dtype}" in names


def off(state):
    """A state whose output is a hundredth too large."""
    return AttentionState(state.out * 1.01, state.lse)


def without_mask(query, keys, values, scale, mask=None):
    return attend_near(query, keys, values, scale)


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ("sparse D=64 float32", {"attend_sparse": lambda *args: off(attend_sparse(*args))}),
        ("sparse", {"attend_sparse": lambda *args: attend_sparse(*args)._replace(out=args[0] * torch.nan)}),
        ("near D=64 float32", {"attend_near": lambda *args: off(attend_near(*args))}),
        ("near, masked", {"attend_near": without_mask}),
        ("merge", {"merge": lambda *states: states[0]}),
    ],
)
def test_a_wrong_kernel_is_found(names, wrong):
    assert {row["status"] for row in rows_of(names)} == {"ok"}
    rows = rows_of(names, **wrong)
    assert {row["status"] for row in rows} == {"failed"}
    assert all(gpu_correct.describe(row).startswith("FAILED") for row in rows)


def test_a_kernel_that_raises_is_a_row_and_the_others_go_on():
    def fail(*args):
        raise RuntimeError("illegal memory access\nand so on")

    rows = rows_of(("near D", "merge"), attend_near=fail)
    assert [row["status"] for row in rows] == ["failed", "ok"] * 3
    assert rows[0]["reason"] == "illegal memory access"


def test_a_failure_is_the_exit_status(monkeypatch, capsys):
    tiny = SMALL._replace(lengths=(), prompts=(), capped=())
    monkeypatch.setattr(gpu_streamed, "WAYS", {})
    monkeypatch.setattr(gpu_measure, "TINY", tiny)
    monkeypatch.setattr(gpu_end_to_end, "measure_model", lambda *args: [])
    monkeypatch.setattr(gpu_correct, "merge", lambda *states: off(merge(*states)))
    assert call(["--dry-run"]) == 1
    assert capsys.readouterr().out.count("FAILED  merge") == 3


def test_time_is_shared_and_what_is_left_goes_on():
    now = [0.0]
    budget = Budget(10, clock=lambda: now[0])
    assert sum(SHARES.values()) == pytest.approx(1)
    assert budget.left("correctness") == pytest.approx(120)
    now[0] = 60.0
    assert budget.left("under a cap") == pytest.approx(360)
    assert budget.left("end to end") == pytest.approx(420)
    now[0] = 700.0
    assert budget.left("prefill") == pytest.approx(-100)


def test_without_time_everything_is_skipped_by_name():
    report = gpu_measure.run(SMALL._replace(lengths=(520, 600)), "cpu", minutes=1e-9, seed=0)
    rows = report["results"]
    assert {row["status"] for row in rows} == {"skipped"}
    assert all(row["reason"] for row in rows)
    assert [row["method"] for row in rows if row["part"] == "end to end"] == list(gpu_end_to_end.METHODS)
    assert [row["method"] for row in rows if row["part"] == "under a cap"] == [case.name for case in CASES]
    assert [row["context"] for row in rows if row["part"] == "prefill"] == [520, 600]


def test_longer_prompts_are_skipped_when_time_runs_out(monkeypatch):
    """The first length is measured whatever it takes; the next would take longer than there is."""
    budget = Budget(10)
    monkeypatch.setattr(budget, "left", lambda part: 1e-3)
    limits = Limits(1e11, 1e10)
    rows = list(gpu_measure._prefill(SMALL._replace(lengths=(520, 600)), "cpu", limits, 0, budget))
    assert (rows[0]["method"], rows[0]["status"]) == ("sdpa", "ok")
    assert (rows[-1]["context"], rows[-1]["status"]) == (600, "skipped")


def test_heads_that_are_made_are_repeated():
    prompt = gpu_measure._repeated(SMALL, 100, seed=0)
    assert [x.shape[1] for x in prompt] == [4, 2, 2]
    assert torch.equal(prompt.query[:, :2], prompt.query[:, 2:])


def test_operations_of_a_prefill():
    """Of Llama 3 8B: 6.98e9 weights in its layers, and at 128K more operations in attention than in them."""
    config = gpu_end_to_end.LlamaConfig(**gpu_end_to_end.LLAMA_8B)
    assert gpu_end_to_end.flops(config, 1) == pytest.approx(2 * 6.98e9, rel=1e-3)
    n = 1 << 17
    assert gpu_end_to_end.flops(config, n) == pytest.approx(2 * 6.98e9 * n + 4 * 128 * 32 * 32 * n * n / 2, rel=1e-3)
    sparse = gpu_end_to_end.flops(config, n, most_keys=1000)
    assert sparse == pytest.approx(2 * 6.98e9 * n + 4 * 128 * 32 * 32 * n * 1000, rel=1e-3)


def test_what_is_read_end_to_end_is_exact():
    """Stock, and our cache with dense prefill, leave the same logits."""
    retrieval_attn.register()
    model = gpu_end_to_end.random_model(TINY.model, "cpu", torch.float32, 0)
    ids = gpu_end_to_end.random_ids(model, 900)
    last = []
    for method in ("stock", "dense"):
        row = {}
        model.set_attn_implementation("sdpa" if method == "stock" else "retrieval")
        kept = []
        hook = model.model.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out[0][:, -1]))
        with torch.no_grad():
            gpu_end_to_end._run(model, method, ids, "cpu", row)
        hook.remove()
        last.append(kept[-1])
        assert row["tokens_per_s"] == pytest.approx(900 / row["prefill_s"])
    torch.testing.assert_close(*last)
    assert row["read"] == 1


@pytest.fixture(scope="module")
def loaded():
    make = lambda: gpu_end_to_end.random_model(TINY.model, "cpu", torch.float32, 0)  # noqa: E731
    return gpu_capped.load(make, "cpu", CASES)


def capped_rows(loaded, left=100.0, cases=CASES):
    return list(gpu_capped.measure(loaded, cases, "cpu", Rates(1e11, 1e10), lambda: left))


def test_a_case_tells_peaks_beside_the_plan(loaded):
    rows = capped_rows(loaded)
    for case, row in zip(CASES, rows, strict=True):
        assert (row["method"], row["context"], row["status"], row["reason"]) == (case.name, LONG, "ok", None)
        assert row["index"] == "scan"
        assert row["ttft_s"] > 0
        assert 0 < row["token_p20_ms"] <= row["token_ms"] <= row["token_p80_ms"]
        assert list(row["phases"]) == ["load", "prefill", "build", "decode"]
        for took in row["phases"].values():
            assert took["host_ratio"] == took["host_bytes"] / took["planned_host_bytes"]
            assert took["host_bytes"] > 0
            assert took["device_bytes"] is took["device_ratio"] is None
    assert rows[0]["read"] == 1
    assert rows[1]["device_kv_budget"] == 0


def test_what_a_case_says(loaded):
    row = capped_rows(loaded, cases=CASES[:1])[0]
    said = gpu_capped.describe(row)
    assert said.startswith("ok          3000 dense, keeps what fits, 24 GiB: ")
    assert "to the first token" in said
    assert "host: load " in said
    row["phases"]["decode"] |= {"device_bytes": 3 * GIB, "device_ratio": 1.5}
    for name in ("load", "prefill", "build"):
        row["phases"][name] |= {"device_bytes": GIB, "device_ratio": 1.0}
    assert gpu_capped.describe(row).endswith("build 1.00 GiB (x 1.00), decode 3.00 GiB (x 1.50)")
    skipped = gpu_capped.describe(row | {"status": "skipped", "context": 1 << 17, "reason": "no time"})
    assert skipped == "skipped     128k dense, keeps what fits, 24 GiB: no time"


def test_cases_have_names_of_their_own():
    assert len({(case.context, case.name) for case in gpu_cases.CASES}) == len(gpu_cases.CASES)
    assert CASES[1].name == "vertical_slash, int8, streams all, 24 GiB then 16 GiB"


def test_a_case_that_would_take_too_long_is_skipped(loaded):
    rows = capped_rows(loaded, left=0.001)
    assert [row["status"] for row in rows] == ["skipped", "skipped"]
    assert rows[0]["reason"].startswith("prefill would take about ")
    assert rows[0]["phases"] == {}


def test_a_case_without_the_cpu_memory_is_skipped(loaded, monkeypatch):
    monkeypatch.setattr(gpu_capped.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    rows = capped_rows(loaded)
    assert [row["status"] for row in rows] == ["skipped", "skipped"]
    assert all("of CPU memory" in row["reason"] for row in rows)


@pytest.mark.parametrize(
    ("failing", "reason", "phases"),
    [
        (2, "build: out of memory: CUDA out of memory", ["load", "prefill", "build"]),
        *rarely((1, "warm-up: out of memory: CUDA out of memory", ["load"])),
    ],
)
def test_want_of_memory_is_a_row_and_the_next_case_goes_on(failing, reason, phases, loaded, monkeypatch):
    calls = []

    def follow(cache, on_progress):
        calls.append(cache)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory\nand so on")
        return follow_builds(cache, on_progress)

    monkeypatch.setattr(gpu_capped, "follow_builds", follow)
    rows = capped_rows(loaded)
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["reason"] == reason
    assert list(rows[0]["phases"]) == phases
    assert all(took["planned_host_bytes"] for took in rows[0]["phases"].values())
    assert gpu_capped.describe(rows[0]).startswith("failed      3000 dense")


def llama_8b():
    """Without weights."""
    with torch.device("meta"):
        return gpu_end_to_end.LlamaForCausalLM(gpu_end_to_end.LlamaConfig(**gpu_end_to_end.LLAMA_8B)).bfloat16()


def test_the_budget_under_a_cap_leaves_what_else_is_planned():
    model, config = llama_8b(), RetrievalConfig(index="scan")
    budget = gpu_planned.budget_under(24 * GIB, model, 1 << 17, config)
    assert 5 * GIB < budget < 7 * GIB
    plan = gpu_planned.planned(model, 1 << 17, replace(config, device_kv_budget=budget), "cuda", libraries=GIB)
    assert plan["prefill"].device + reserve(config) + CUDA_CONTEXT == 24 * GIB
    assert plan["load"] == (gpu_planned.weight_bytes(model), GIB)
    assert plan["decode"].device < 22 * GIB
    assert plan["decode"].host > 17 * GIB
    assert gpu_planned.budget_under(16 * GIB, model, 1 << 17, config) == 0


@pytest.mark.parametrize(("total", "fraction"), [(48, 23.5 / 48), (16, 1.0)])
def test_a_cap_ends_with_its_block_whatever_happens(total, fraction, monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, total * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", said.append)
    with pytest.raises(RuntimeError), gpu_capped.capped("cuda", 24 * GIB):
        assert said == [pytest.approx(fraction)]
        raise RuntimeError("out of memory")
    assert said[1:] == [1.0]


def test_device_figures_come_from_the_allocator(loaded, monkeypatch):
    """Rehearsed on the CPU: of CUDA, only the counters are asked."""
    said, peaks = [], {"allocated": 3 * GIB, "reserved": 4 * GIB}
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda *device, peak=peak: peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 47 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", said.append)
    (row,) = gpu_capped.measure(loaded, CASES[1:], "cuda", Rates(1e11, 1e10), lambda: 100.0)
    assert (row["status"], row["reason"]) == ("ok", None)
    # Twice: the short prompt comes first.
    assert said == 2 * [0.5, 1.0, 15.5 / 47, 1.0]
    took = row["phases"]["decode"]
    assert (took["device_bytes"], took["reserved_bytes"]) == (3 * GIB, 4 * GIB)
    assert took["device_ratio"] == 3 * GIB / took["planned_device_bytes"]


def streamed_rows(**options):
    """Rows of the ways to read a prompt, with some of what they call replaced."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in options.items():
            patch.setattr(f"retrieval_attn.{name.replace('__', '.')}", function)
        rows = list(check_all(gpu_streamed.cases("cpu", 1), lambda: 1.0))
    return {row["method"].removeprefix("prefill, "): row["status"] for row in rows}


def without_first_tile(memory, device):
    yield from list(stream.earlier(memory, device))[1:]


def values_moved(memory, keys, values, heads):
    """Every key stands beside its neighbour's value."""
    whole = stream.whole_heads(memory, keys, values, heads)
    return whole[0], whole[1].roll(1, dims=2)


def without_far_keys(query, keys, values, memory, scale, clock):
    memory.append(query, keys, values)
    return gpu_correct.reference.attend_dense(query, keys, values, scale, causal=True)


EXACT = ("all streamed", "all streamed, one tile", "a third kept", "all kept", "follow-up retrieves")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({}, ()),
        ({"attention__prefill__earlier": without_first_tile}, (*EXACT, "sparse, a third kept")),
        *rarely(({"attention__prefill__whole_heads": values_moved}, ("sparse, a third kept",))),
        *rarely(({"hf__layer__decode_block": without_far_keys}, ("follow-up retrieves",))),
    ],
)
def test_what_is_streamed_wrongly_is_found(wrong, found):
    rows = streamed_rows(**wrong)
    assert set(rows) == set(gpu_streamed.WAYS)
    assert {name for name, status in rows.items() if status == "failed"} == set(found)


def test_int8_on_the_device_is_held_against_int8_on_the_cpu():
    """Only the first reading, which is the device's, goes wrong."""
    read, readings = gpu_streamed.read, []

    def read_first_wrongly(model, ids, config):
        readings.append(config.kv_dtype)
        with pytest.MonkeyPatch.context() as patch:
            if len(readings) == 1:
                patch.setattr("retrieval_attn.attention.prefill.earlier", without_first_tile)
            return read(model, ids, config)

    chosen = [case for case in gpu_streamed.cases("cpu", 1) if "int8" in case.name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_streamed, "read", read_first_wrongly)
        rows = list(check_all(chosen, lambda: 1.0))
    assert [row["status"] for row in rows] == ["failed"]
    assert readings == ["int8", "int8"]


def test_a_budget_that_is_not_filled_is_found():
    """On a device; a CPU keeps nothing."""
    model = gpu_streamed.setting("cpu", 0).model
    config = RetrievalConfig(device_kv_budget=100 * gpu_streamed.TOKEN_BYTES + 1)
    cache = retrieval_attn.RetrievalCache(model.config, config)
    with torch.no_grad(), cache.exact():
        model(input_ids=gpu_end_to_end.random_ids(model, 200), **cache_argument(cache), use_cache=True)
    gpu_streamed._check_kept(cache, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"must keep 100 tokens of a layer, got \[0\]"):
        gpu_streamed._check_kept(cache, torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_device_it_says_what_it_would_do(capsys):
    assert call(["--minutes", "3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no CUDA device here: this would check every Triton kernel")
    assert "in 3 minutes" in said
    assert said.count("\n") == 1


def test_files_that_cannot_be_written_are_told_at_once(tmp_path, capsys):
    assert call(["--dry-run", "-o", str(tmp_path / "no" / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("error: --out must lie in a folder that exists")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "x"])
def test_times_that_are_none(minutes, capsys):
    assert call(["--minutes", minutes]) == 2
    assert "--minutes" in capsys.readouterr().err


def test_rows_go_to_a_file_named_after_the_device():
    found = default_out(Path("results"), "NVIDIA GeForce RTX 4090")
    assert found == Path("results/gpu-check-nvidia-geforce-rtx-4090.json")
