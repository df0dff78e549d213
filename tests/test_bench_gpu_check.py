"""The GPU check, rehearsed on a CPU: it goes all the way, finds what is wrong, and ends in time."""

import json
import subprocess
import sys

import pytest
import torch

from retrieval_attn.bench import gpu_check, gpu_correct, gpu_end_to_end, gpu_run
from retrieval_attn.bench.gpu_correct import cases, check_all
from retrieval_attn.bench.gpu_run import SHARES, TINY, Budget
from retrieval_attn.bench.kernels_rows import Limits
from retrieval_attn.kernels import AttentionState, NearestKeys, attend_near, attend_sparse, merge, nearest_keys

SMALL = TINY._replace(lengths=(520,), prompts=(900,), chunk=256)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(gpu_run.machine, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(gpu_run, "peak_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr("retrieval_attn.bench.kernels_steps.CALLS", 2)


def rows_of(names, **wrong):
    """Rows of the small cases whose names begin so, with some functions replaced by wrong ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in wrong.items():
            patch.setattr(gpu_correct, name, function)
        chosen = [case for case in cases("cpu", 0, (64,)) if case.name.startswith(names)]
        return list(check_all(chosen, lambda: 1.0))


def test_a_rehearsal_goes_all_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "TINY", SMALL)
    out = tmp_path / "rows.json"
    assert gpu_check.main(["--dry-run", "-o", str(out)]) == 0
    report = json.loads(out.read_text())
    printed = capsys.readouterr().out.strip().split("\n")
    assert json.loads(printed[-1]) == report["results"]
    assert set(report) == {"schema_version", "env", "config", "results", "notes"}
    assert {"git", "packages", "gpu", "gpu_driver", "matmul_flops_per_s"} <= set(report["env"])
    parts = {row["part"] for row in report["results"]}
    assert parts == {"correctness", "end to end", "prefill", "decode", "build"}
    assert {row["status"] for row in report["results"]} == {"ok"}


def test_every_kernel_in_every_dimension_and_dtype():
    names = {case.name for case in cases("cpu", 0)}
    assert len(names) == 4 * 3 * 5
    for D in (64, 96, 128, 256):
        for dtype in ("float16", "bfloat16", "float32"):
            for kernel in ("sparse", "near", "near, masked", "merge", "nearest_keys"):
                assert f"{kernel} D={D} {dtype}" in names


def off(state):
    """A state whose output is a hundredth too large."""
    return AttentionState(state.out * 1.01, state.lse)


def without_mask(query, keys, values, scale, mask=None):
    return attend_near(query, keys, values, scale)


def next_ids(*args):
    found = nearest_keys(*args)
    return NearestKeys((found.ids + 1) % args[1].shape[1], found.scores)


def other_scores(*args):
    found = nearest_keys(*args)
    return NearestKeys(found.ids, found.scores + 1)


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ("sparse D=64 float32", {"attend_sparse": lambda *args: off(attend_sparse(*args))}),
        ("sparse", {"attend_sparse": lambda *args: attend_sparse(*args)._replace(out=args[0] * torch.nan)}),
        ("near D=64 float32", {"attend_near": lambda *args: off(attend_near(*args))}),
        ("near, masked", {"attend_near": without_mask}),
        ("merge", {"merge": lambda *states: states[0]}),
        ("nearest_keys", {"nearest_keys": next_ids}),
        ("nearest_keys", {"nearest_keys": other_scores}),
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
    tiny = SMALL._replace(lengths=(), prompts=())
    monkeypatch.setattr(gpu_run, "TINY", tiny)
    monkeypatch.setattr(gpu_end_to_end, "measure_model", lambda *args: [])
    monkeypatch.setattr(gpu_correct, "merge", lambda *states: off(merge(*states)))
    assert gpu_check.main(["--dry-run"]) == 1
    assert capsys.readouterr().out.count("FAILED  merge") == 3


def test_time_is_shared_and_what_is_left_goes_on():
    now = [0.0]
    budget = Budget(10, clock=lambda: now[0])
    assert sum(SHARES.values()) == pytest.approx(1)
    assert budget.left("correctness") == pytest.approx(180)
    now[0] = 60.0
    assert budget.left("end to end") == pytest.approx(300)
    now[0] = 700.0
    assert budget.left("prefill") == pytest.approx(-100)


def test_without_time_everything_is_skipped_by_name():
    report = gpu_run.run(SMALL._replace(lengths=(520, 600)), "cpu", minutes=1e-9, seed=0)
    rows = report["results"]
    assert {row["status"] for row in rows} == {"skipped"}
    assert all(row["reason"] for row in rows)
    assert [row["method"] for row in rows if row["part"] == "end to end"] == list(gpu_end_to_end.METHODS)
    assert [row["context"] for row in rows if row["part"] == "prefill"] == [520, 600]


def test_longer_prompts_are_skipped_when_time_runs_out(monkeypatch):
    """The first length is measured whatever it takes; the next would take longer than there is."""
    budget = Budget(10)
    monkeypatch.setattr(budget, "left", lambda part: 1e-3)
    limits = Limits(1e11, 1e10)
    rows = list(gpu_run._prefill(SMALL._replace(lengths=(520, 600)), "cpu", limits, 0, budget))
    assert (rows[0]["method"], rows[0]["status"]) == ("sdpa", "ok")
    assert (rows[-1]["context"], rows[-1]["status"]) == (600, "skipped")


def test_heads_that_are_made_are_repeated():
    prompt = gpu_run._repeated(SMALL, 100, seed=0)
    assert [x.shape[1] for x in prompt] == [4, 2, 2]
    assert torch.equal(prompt.query[:, :2], prompt.query[:, 2:])


def test_operations_of_a_prefill():
    """Of Llama 3 8B: 6.98e9 weights in its layers, and at 128K more operations in attention than in them."""
    config = gpu_end_to_end.LlamaConfig(**gpu_end_to_end.LLAMA_8B)
    assert gpu_end_to_end.flops(config, 1) == pytest.approx(2 * 6.98e9, rel=1e-3)
    n = 1 << 17
    assert gpu_end_to_end.flops(config, n) == pytest.approx(2 * 6.98e9 * n + 4 * 128 * 32 * 32 * n * n / 2, rel=1e-3)


def test_what_is_read_end_to_end_is_exact():
    """Stock, and our cache with dense prefill, leave the same logits."""
    import retrieval_attn

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_device_it_says_what_it_would_do(capsys):
    assert gpu_check.main(["--minutes", "3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("no CUDA device here: this would check every Triton kernel")
    assert "in 3 minutes" in said
    assert said.count("\n") == 1


def test_as_a_script_it_does_not_hide_packages():
    """Its folder, first on the path of a script, has a kernels.py; transformers looks for a package of that name."""
    folder = str(gpu_check.RESULTS.parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import gpu_check; gpu_check._leave_folder()"
    code += f"; sys.exit({folder!r} in sys.path)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_files_that_cannot_be_written_are_told_at_once(tmp_path, capsys):
    assert gpu_check.main(["--dry-run", "-o", str(tmp_path / "no" / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("error: --output must lie in a folder that exists")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "x"])
def test_times_that_are_none(minutes, capsys):
    with pytest.raises(SystemExit) as left:
        gpu_check.main(["--minutes", minutes])
    assert left.value.code == 2
    assert "--minutes" in capsys.readouterr().err


def test_names_of_devices_in_names_of_files():
    assert gpu_check.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
