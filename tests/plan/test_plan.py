"""The plan of memory: every term against what is really taken, and what is said of it."""

import json
import tracemalloc
from dataclasses import replace

import pytest
import torch
from laws import rarely
from tiny_models import save_tiny_chat_model, tiny_config, tiny_model
from transformers import LlamaConfig
from typer.testing import CliRunner

from retrieval_attn import cli
from retrieval_attn.attention.layer_memory import LayerMemory, MemoryShape
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.far.index_choice import bytes_per_key
from retrieval_attn.far.query_sample import QuerySample
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.index import build_index
from retrieval_attn.kernels import TailSummary
from retrieval_attn.plan import terms as plan_terms
from retrieval_attn.plan.plan import GIB, Base, MemoryPlan, Target, plan_memory, plan_phases
from retrieval_attn.plan.terms import ModelShape
from retrieval_attn.terminal.plan_report import estimate_memory, measure_libraries, weight_bytes

BF16 = torch.bfloat16
M = 1 << 20
MIB = 1 << 20
CONFIG = RetrievalConfig(index="scan")


def llama3_8b():
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=M,
        dtype="bfloat16",
    )


def phases_of(config=CONFIG, n_tokens=M, model=None, base=None, target=None):
    found = plan_phases(model or llama3_8b(), n_tokens, BF16, config, base or Base(), target or Target())
    return {phase.name: phase for phase in found}


# The device


def test_a_million_tokens_of_an_8b_model_fit_a_card_of_24_gb(capsys):
    base = Base(weights=weight_bytes(llama3_8b(), BF16), checkpoint=weight_bytes(llama3_8b(), BF16))
    phases = phases_of(base=base, target=Target("cuda", 24 * GIB))
    with capsys.disabled():
        print()
        for phase in phases.values():
            terms = ", ".join(f"{name} {n / GIB:.2f}" for name, n in phase.device_terms.items())
            print(f"  {phase.name}: {phase.device / GIB:.2f} GiB ({terms})")
    assert base.weights == 2 * 8_030_261_248
    assert all(phase.device < 24 * GIB for phase in phases.values())
    assert phases["prefill"].device_terms["resident prefix"] > 4 * GIB
    # The prefix fills what is left, so the room that matters is that without it.
    assert phases["prefill"].device - phases["prefill"].device_terms["resident prefix"] < 17 * GIB


def test_device_memory_does_not_grow_with_the_prompt():
    target, config = Target("cuda", 24 * GIB), replace(CONFIG, device_kv_budget=GIB)
    short, long = (phases_of(config, n, target=target)["prefill"].device for n in (128 * 1024, M))
    assert short == long
    # Sparse prefill brings one whole head of a layer at least: at 4M tokens more than two tiles.
    assert phases_of(replace(config, prefill="auto"), 4 * M, target=target)["prefill"].device > long


def test_the_prefix_on_the_device_obeys_its_budget():
    def resident(config, memory, n_tokens=M):
        return phases_of(config, n_tokens, target=Target("cuda", memory))["prefill"].device_terms["resident prefix"]

    assert resident(replace(CONFIG, device_kv_budget=3 * GIB), 24 * GIB) == 3 * GIB
    assert resident(replace(CONFIG, device_kv_budget=3 * GIB), 24 * GIB, 1024) == 128 * 1024 * 1024
    assert resident(CONFIG, None) == 0
    assert resident(CONFIG, 1 * GIB) == 0


def test_a_cpu_has_no_device_terms():
    assert not any(phase.device_terms for phase in phases_of().values())
    assert {"activations", "near window"} <= set(phases_of()["prefill"].host_terms)
    on_card = phases_of(target=Target("cuda"))["prefill"]
    assert "activations" not in on_card.host_terms
    assert on_card.host_terms["pinned staging"] == on_card.device_terms["tiles"] == 2 * 65536 * 4096


# Terms in CPU memory


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3"])
def test_terms_are_what_a_model_holds(kind):
    """The plan of a tiny model, term by term, against the tensors it made."""
    from retrieval_attn.hf.attention import register
    from retrieval_attn.hf.cache import RetrievalCache

    register()
    config = RetrievalConfig(index="page", n_sink=16, n_local=64, exact_below=0, build_queries=32)
    model = tiny_model(kind)
    cache = RetrievalCache(model.config, config)
    ids = torch.randint(2, 128, (1, 1500))
    with torch.no_grad(), cache.exact():
        model(ids, **cache_argument(cache), logits_to_keep=1)
    for memory in cache.memories:
        memory.index()
    shape = ModelShape.of(model.config, torch.float32)
    assert shape.n_layers == len(cache.memories)
    assert plan_terms.stored_kv(shape, 1500, config) == sum(m.store.nbytes for m in cache.memories)
    assert plan_terms.query_sample(shape, config) == sum(_sample_bytes(m.sample) for m in cache.memories)
    stock = [layer for layer in cache.layers if layer not in cache.retrieval_layers]
    near = sum(m.window.nbytes for m in cache.memories) + sum(x.keys.nbytes + x.values.nbytes for x in stock)
    # A stock sliding layer keeps one token less than its window says.
    assert 0 <= plan_terms.near_window(shape, config) - near <= shape.row * len(stock)


def _sample_bytes(sample: QuerySample) -> int:
    return sum(x.nbytes for x in (sample._spread, sample._recent) if x is not None)


def test_int8_halves_keys_and_values_but_not_the_window():
    shape = ModelShape.of(llama3_8b(), BF16)
    int8 = RetrievalConfig(kv_dtype="int8")
    assert 2 * plan_terms.stored_kv(shape, 1000, int8) == plan_terms.stored_kv(shape, 1000, CONFIG)
    assert plan_terms.near_window(shape, int8) == plan_terms.near_window(shape, CONFIG)
    memory = LayerMemory(int8, MemoryShape(2, 16, 16, BF16, 100))
    memory.append(*(torch.randn(1, heads, 50, 16, dtype=BF16) for heads in (4, 2, 2)))
    tiny = replace(shape, n_layers=1, G=2, D=16)
    assert plan_terms.stored_kv(tiny, 50, int8) == memory.store.keys().nbytes + memory.store.values().nbytes
    assert phases_of(int8)["prefill"].host < phases_of()["prefill"].host


def test_keys_and_values_on_disk_take_no_memory(tmp_path):
    on_disk = replace(CONFIG, kv_dir=str(tmp_path))
    plan = plan_memory(llama3_8b(), M, BF16, on_disk)
    assert plan.host_kv == 0
    assert phases_of(on_disk)["prefill"].host_terms["keys and values"] == 0


@pytest.mark.parametrize(
    ("kind", "G", "n_keys", "D"),
    # The graph's tree takes the most of long contexts, its links of short ones.
    [*((kind, 2, 15_000, 32) for kind in ("exact", "graph", "scan", "page")), *rarely(("graph", 1, 100_000, 64))],
)
def test_scratch_of_a_build(kind, G, n_keys, D):
    """NumPy's own account of the memory of a build, within a quarter of the plan."""
    H, T = 4, 1280
    keys, queries = torch.randn(G, n_keys, D).bfloat16(), torch.randn(H, T, D).bfloat16()
    build_index(kind, keys[:, :3000], queries)
    tracemalloc.start()
    try:
        index = build_index(kind, keys, queries)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    shape = ModelShape(n_layers=1, sliding=0, H=H, G=G, D=D, hidden=64, mlp=64, vocabulary=10, itemsize=2)
    config = RetrievalConfig(index=kind, build_queries=(T - 256) // 2)
    planned = plan_terms.build_scratch(shape, kind, n_keys, config)
    assert 0.75 * planned - MIB <= peak - index.nbytes <= 1.25 * planned + MIB


def test_the_tail_summary():
    shape = ModelShape(n_layers=1, sliding=0, H=4, G=2, D=32, hidden=64, mlp=64, vocabulary=10, itemsize=2)
    for n in (300, 40_000, 100_000):
        keys = torch.randn(2, n, 32)
        held = TailSummary(keys, keys).nbytes
        assert held <= plan_terms.tail_summary(shape, n, CONFIG) <= 3 * held
    assert plan_terms.tail_summary(shape, 1000, replace(CONFIG, estimator="topk")) == 0


def test_every_phase_has_what_it_needs():
    base = Base(libraries=GIB, weights=16 * GIB, checkpoint=16 * GIB)
    phases = phases_of(base=base)
    assert list(phases) == ["load", "prefill", "build", "decode", "save", "restore"]
    # Files of the same dtype are mapped, and are the weights; of another, they lie beside them.
    assert phases["load"].host == 17 * GIB
    assert phases_of(base=replace(base, checkpoint=8 * GIB))["load"].host == 25 * GIB
    assert phases["save"].host_terms["one layer"] == 4 * GIB
    assert phases["build"].host > phases["prefill"].host
    growth = phases["decode"].host - phases_of(base=base, n_tokens=M // 2)["decode"].host
    rows = 32 * 8 * (M // 2)
    # Beside keys, values and the index there are token ids, and the copy of one layer's index.
    assert growth == pytest.approx(rows * (512 + bytes_per_key("scan", 128) * 33 / 32) + 64 * M // 2)


# The check before any work


def test_plans_add_up_and_say_what_they_are():
    plan = plan_memory(tiny_config("llama"), 5000, torch.float32, CONFIG)
    assert plan.host == plan.host_kv + plan.index
    assert plan.passing > 0
    assert str(plan).startswith("5000 tokens: ")
    assert MemoryPlan(5, 1, 1, 1).passing == 0


def test_too_little_memory_names_need_free_and_the_ways_out(monkeypatch):
    free = 2 * GIB
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": free})())
    said = r"9 tokens need 3.0 GiB more of CPU memory, but 2.0 GiB are free; use kv_dtype='int8', kv_dir=PATH .*shorter"
    with pytest.raises(MemoryError, match=said):
        MemoryPlan(9, 2 * GIB, GIB, 0).check()
    MemoryPlan(9, 2 * GIB, GIB, 0).check(already=GIB)
    # What passes counts for a new context, and not for one that has had its peak.
    with pytest.raises(MemoryError, match="need 2.5 GiB"):
        MemoryPlan(9, GIB, GIB, 0, passing=GIB // 2).check()
    MemoryPlan(9, GIB, GIB, 0, passing=GIB // 2).check(already=1)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


def call(*arguments):
    return CliRunner().invoke(cli.app, ["estimate", *map(str, arguments)], catch_exceptions=False)


def test_estimate_prints_phases_peaks_and_a_verdict():
    done = call("-c", "8k,1m", "--index", "scan", "--host-memory", "64g")
    assert done.exit_code == 0
    for word in ("load", "prefill", "build", "decode", "save", "restore", "8,192 tokens: fits", "1,048,576 tokens: "):
        assert word in done.output


def test_estimate_as_json_says_what_the_plan_says(folder):
    done = call("-m", folder, "-c", "4096", "--index", "page", "--json", "--dtype", "float32")
    (said,) = json.loads(done.stdout)
    assert said["fits"] is True
    assert said["peak_host"] == max(phase["host"] for phase in said["phases"])
    assert all(phase["host"] == sum(phase["host_terms"].values()) for phase in said["phases"])


def test_a_device_that_is_not_here_can_be_planned_for(folder):
    done = call("-m", folder, "-c", "4k", "--device", "cuda", "--device-memory", "24g", "--index", "scan")
    assert "device" in done.output
    (small,) = estimate_memory(folder, [4096], CONFIG, device="cuda", device_memory=1 << 20)
    assert not small.fits
    assert "use --weights int8 or int4" in small.verdict


def test_another_machine_can_be_planned_for_and_the_exit_status_says_if_it_fits(folder):
    large, small = (call("-m", folder, "-c", "4k,1m", "--index", "auto", "--host-memory", n) for n in ("64g", "1g"))
    assert large.exit_code == 0
    assert small.exit_code == 1
    assert "of 1.00 GiB free" in small.output
    assert "1,048,576 tokens: does not fit" in small.output


def test_auto_chooses_for_the_memory_that_is_planned_for():
    def index(host_memory):
        (one,) = estimate_memory(None, [1 << 20], RetrievalConfig(index="auto"), device="cpu", host_memory=host_memory)
        return one.phases[-1].host_terms["index"]

    assert index(64 << 30) > index(300 << 20) > 0


def test_no_weights_are_read(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert estimate_memory(tmp_path, [4096], CONFIG)[0].host > 0


def test_weights_are_counted_as_they_are_held(folder):
    model = tiny_model("llama")
    assert weight_bytes(model.config, torch.float32) == sum(p.nbytes for p in model.parameters())
    full, int8, int4 = (weight_bytes(llama3_8b(), BF16, kind) for kind in ("bf16", "int8", "int4"))
    # Embeddings and the layer that gives the logits stay: 2 x 128,256 x 4,096 of 8.03 billion.
    assert int8 == pytest.approx(0.565 * full, rel=0.01)
    assert int4 == pytest.approx(0.375 * full, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "8x"], "--context must be tokens such as 8k"),
        (["-m", "/nowhere/at/all"], "no model at '/nowhere/at/all'"),
        (["--weights", "int3"], "weights must be one of"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--weights", "bf16", "--dtype", "float32"], "contradict each other"),
        (["--device", "tpu"], "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        (["--device", "cuda", "--device-memory", "lots"], "--device-memory must be bytes such as 24g"),
        (["--device", "cpu", "--device-memory", "24g"], "device_memory is of a CUDA device"),
        (["--kv-dtype", "int4"], "kv_dtype must be"),
        (["--index", "tree"], "index must be one of"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


def test_a_config_without_dtype_asks_for_one(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="dtype must be given"):
        estimate_memory(tmp_path, [4096], CONFIG)
    assert estimate_memory(tmp_path, [4096], CONFIG, dtype="float32")


def test_measuring_the_libraries_leaves_no_trace():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert measure_libraries(CONFIG, BF16) > 100 << 20
    assert torch.equal(torch.rand(3), expected)
