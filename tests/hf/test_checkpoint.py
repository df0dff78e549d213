"""What a model is loaded from: folders, GGUF files, and what is refused, in one line, before any weight is read."""

import importlib.util
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import retrieval_attn as ra
from retrieval_attn.hf import checkpoint
from retrieval_attn.hf.checkpoint import find_checkpoint, read_config
from retrieval_attn.hf.gguf_header import read_header
from retrieval_attn.hf.versions import READS_GGUF, cache_argument
from retrieval_attn.hf.weights import load_weights, weight_options

HAS_GGUF = all(importlib.util.find_spec(name) for name in ("gguf", "accelerate"))

reads_gguf = pytest.mark.skipif(not (READS_GGUF and HAS_GGUF), reason="needs gguf, accelerate and transformers 5.18")

CONFIG = ra.RetrievalConfig(index="exact", top_k=1 << 20, n_sink=4, n_local=16, exact_below=0, prefill_chunk=50)
TEXT = "The lighthouse keeper counts ships. " * 5
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder that holds one GGUF file, and nothing else."""
    if not (READS_GGUF and HAS_GGUF):
        pytest.skip("needs gguf, accelerate and transformers 5.18")
    return written(tmp_path_factory.mktemp("whole"))


def written(place, name="tiny.gguf", **other):
    from tiny_gguf import save_tiny_gguf

    return save_tiny_gguf(place / name, **other)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_named(folder, tmp_path, name):
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer, not the file itself; run `git lfs pull`"):
        ra.load(copied)


def test_a_tokenizer_of_another_model_is_refused_before_weights_are_read(folder, tmp_path):
    """Its ids would point behind the embeddings, or, where they do not, at other words."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "model.safetensors").unlink()
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match=r"tokenizer at .* has \d+ tokens and the model knows 100; take the tokenizer"):
        ra.load(copied)


def test_a_pointer_that_nobody_reads_does_no_harm(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    for name in ("pytorch_model.bin", "tokenizer.model", "consolidated.safetensors", "other.gguf"):
        (copied / name).write_bytes(POINTER)
    assert find_checkpoint(copied).source == str(copied)


def test_a_pointer_in_the_place_of_a_gguf_file_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(POINTER)
    for asked in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ValueError, match="model.gguf is a Git LFS pointer"):
            ra.load(asked)


def test_several_gguf_files_are_named(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); name the one to load"):
        ra.load(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match="is a file, but no GGUF file; give the folder"):
        ra.load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"no model at 'org/none.gguf'.*a GGUF file"):
        ra.load("org/none.gguf")


@pytest.mark.skipif(READS_GGUF, reason="this transformers reads GGUF files")
def test_an_older_transformers_is_named(tmp_path):
    """4.57.6 answers in French what the capital of France is: it puts a second BOS before the chat."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"transformers 4.* pip install -U transformers"):
        ra.load(tmp_path)


@pytest.mark.skipif(not READS_GGUF, reason="an older transformers is refused first")
def test_missing_packages_are_named(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs gguf and accelerate; pip install gguf accelerate"):
        ra.load(tmp_path)


def test_a_cut_file_is_refused_wherever_it_ends(whole, tmp_path):
    content, cut = whole.read_bytes()[: read_header(whole).n_bytes], tmp_path / "cut.gguf"
    for n in [5, 24, 40, *range(100, len(content), len(content) // 50), len(content) - 1]:
        cut.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"cut.gguf is cut"):
            find_checkpoint(cut)


def test_the_header_knows_how_long_the_file_is(whole):
    # The writer fills the last block.
    assert 0 <= whole.stat().st_size - read_header(whole).n_bytes < 32


def test_other_files_by_that_name_are_refused(whole, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + whole.read_bytes()[4:])
    with pytest.raises(ValueError, match="is not a GGUF file: it does not begin with GGUF"):
        find_checkpoint(other)
    other.write_bytes(b"GGUF" + struct.pack("<I", 1) + whole.read_bytes()[8:])
    with pytest.raises(ValueError, match="has version 1 of GGUF; versions 2 and 3 are read"):
        find_checkpoint(other)


def parts(place, **other):
    """The parts that a tiny GGUF file comes in, the first first."""
    written(place, per_part=12, **other)
    return sorted(place.glob("*.gguf"))


@reads_gguf
@pytest.mark.parametrize("fields_apart", [False, True])
def test_parts_are_read_as_the_whole(whole, tmp_path, fields_apart):
    """Named by their folder or by any of them, and nothing is left beside them."""
    found = parts(tmp_path, fields_apart=fields_apart)
    assert len(found) == 3 + fields_apart
    llm = ra.load(whole, CONFIG)
    expected = llm.generate(TEXT, max_new_tokens=20).token_ids
    for asked in (tmp_path, found[0], found[-1]):
        again = ra.load(asked, CONFIG)
        assert again.generate(TEXT, max_new_tokens=20).token_ids == expected
        for ours, theirs in zip(again.model.parameters(), llm.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert sorted(tmp_path.iterdir()) == found


@reads_gguf
def test_parts_are_planned_for_without_their_weights(whole, tmp_path):
    from retrieval_attn.terminal.plan_report import estimate_memory

    parts(tmp_path)
    (found,), (expected,) = (estimate_memory(model, [1000], CONFIG, device="cpu") for model in (tmp_path, whole))
    weights = ("checkpoint", "weights")
    kept = [{name: plan.phases[0].host_terms[name] for name in weights} for plan in (found, expected)]
    assert kept[0]["weights"] == kept[1]["weights"]
    assert 0 <= kept[0]["checkpoint"] - kept[1]["checkpoint"] < 1000
    with find_checkpoint(tmp_path).arguments() as (folder, named):
        joined = Path(folder) / named["gguf_file"]
        assert joined.stat().st_size > 64 * joined.stat().st_blocks


@reads_gguf
def test_factors_of_positions_are_read_from_the_part_that_holds_them(tmp_path):
    """They are the last tensor."""
    parts(tmp_path, rope_freqs=factors_of(LLAMA3))
    assert read_config(find_checkpoint(tmp_path)).rope_parameters["factor"] == 8


@reads_gguf
def test_parts_that_are_no_whole_are_refused(tmp_path):
    found = parts(tmp_path)
    second = found[1].read_bytes()
    found[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"part 2 of 3 is missing: {found[1]}"):
        ra.load(tmp_path)
    found[1].write_bytes(second[:-200])
    with pytest.raises(ValueError, match="00002-of-00003.gguf is cut"):
        ra.load(tmp_path)
    shutil.copy(found[2], found[1])
    with pytest.raises(ValueError, match="00002-of-00003.gguf says that it is part 3 of 3; download it again"):
        ra.load(tmp_path)
    found[1].write_bytes(second)
    shutil.copy(found[0], tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="holds 4 GGUF files"):
        ra.load(tmp_path)


@reads_gguf
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"general__type": "adapter"}, "holds a LoRA adapter; give the GGUF file of the model itself"),
        ({"general__type": "mmproj"}, "holds no model but 'mmproj'"),
        ({"split__count": 3, "split__no": 1}, "is one of 3 parts; name them MODEL-00001-of-00003.gguf and so on"),
        ({"architecture": "frobnicator"}, "cannot be loaded: GGUF model with architecture frobnicator is not"),
        ({"llama__attention__sliding_window": 64}, "says attention.sliding_window=64, but transformers reads"),
        ({"llama__rope__scaling__type": "yarn"}, r"scales positions .* not read .*\(rope.scaling.type\)"),
        ({"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0}, "scales positions"),
        ({"llama__rope__scaling__factor": 0.5}, "scales positions"),
        ({"llama__rope__scale_linear": 2.0}, r"scales positions .*\(rope.scale_linear\)"),
        ({"rope_freqs": [1.0] * 7 + [3.0]}, r"scales positions .*\(rope_freqs.weight\)"),
        ({"without": "blk.1.ffn_up.weight"}, "lacks 1 of its weights, the first is model.layers.1.mlp.up_proj.weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_one_line(tmp_path, wrong, message):
    path = written(tmp_path, **wrong)
    with pytest.raises(ValueError, match=message) as raised:
        ra.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@reads_gguf
def test_other_numbers_are_refused(whole):
    with pytest.raises(ValueError, match="a GGUF file has its own numbers; weights must be 'auto' or 'bf16' for it"):
        ra.load(whole, weights="int8")


def test_a_gguf_file_equals_stock(whole):
    """Also named by its folder, and read from elsewhere, where a file of its name lies."""
    llm = ra.load(whole, CONFIG)
    ids = llm.encode(TEXT)
    assert llm.weights == "GGUF, unpacked"
    stock = AutoModelForCausalLM.from_pretrained(whole.parent, gguf_file=whole.name, dtype="float32")
    expected = stock.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    assert llm.generate(TEXT, max_new_tokens=20).token_ids == expected
    assert ra.load(whole.parent, CONFIG).generate(TEXT, max_new_tokens=20).token_ids == expected


def test_the_tokenizer_and_its_template_are_the_files_own(whole, folder, tmp_path):
    """A folder of downloads may hold a tokenizer of something else."""
    shutil.copy(whole, tmp_path / "tiny.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    llm = ra.load(tmp_path / "tiny.gguf")
    stock = AutoTokenizer.from_pretrained(whole.parent, gguf_file=whole.name)
    assert llm.encode("né <|end|>") == stock("né <|end|>")["input_ids"]
    assert (
        llm.render([{"role": "user", "content": "né"}], add_generation_prompt=True) == "<|user|>né<|end|><|assistant|>"
    )
    assert llm.stop_ids() == [256, 256]


def test_a_relative_path_is_this_file_and_no_other(whole, tmp_path, monkeypatch):
    """transformers looks for the name in the working folder first."""
    shutil.copy(whole, tmp_path / "tiny.gguf")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tiny.gguf").write_bytes(b"another file of that name")
    monkeypatch.chdir(tmp_path / "work")
    assert ra.load("../tiny.gguf").generate(TEXT, max_new_tokens=2).token_ids


def test_bf16_is_unpacked_and_estimated(whole):
    from retrieval_attn.terminal.plan_report import estimate_memory

    assert ra.load(whole, weights="bf16").model.dtype == torch.bfloat16
    read_as = {"auto": torch.float32, "bf16": torch.bfloat16}
    n_weights = ra.load(whole).model.num_parameters()
    for weights, dtype in read_as.items():
        (found,) = estimate_memory(whole, [1000], CONFIG, weights=weights, device="cpu")
        assert found.phases[0].host_terms["weights"] == n_weights * dtype.itemsize
        assert found.phases[0].host_terms["checkpoint"] == read_header(whole).n_bytes


def test_a_session_outlives_the_move_of_its_file_but_not_another_file(whole, tmp_path):
    session = ra.load(whole, CONFIG).session()
    session.ask(TEXT, max_new_tokens=4)
    session.save(tmp_path / "saved")
    expected = session.ask("And then?", max_new_tokens=8)
    shutil.copy(whole, tmp_path / "moved.gguf")
    restored = ra.load(tmp_path / "moved.gguf", CONFIG).restore(tmp_path / "saved")
    done = restored.ask("And then?", max_new_tokens=8)
    assert done.token_ids == expected.token_ids
    assert done.stats.reused_tokens > 0
    other = bytearray(whole.read_bytes())
    start = len(other) // 2
    other[start : start + 40_000] = bytes(40_000)
    (tmp_path / "other.gguf").write_bytes(other)
    with pytest.raises(ValueError, match="was saved with another model"):
        ra.load(tmp_path / "other.gguf", CONFIG).restore(tmp_path / "saved")


def test_where_a_file_lies_is_no_part_of_a_model_that_keeps_its_quantisation(whole):
    """As on a GPU, where weights may stay packed."""
    found = find_checkpoint(whole)
    options = weight_options(found, "auto", "float32", torch.device("cuda")) | {"device_map": {"": "cpu"}}
    model = load_weights(found, read_config(found), options, torch.device("cpu"), "sdpa")
    assert model.config.quantization_config.gguf_file is None
    assert str(whole) not in str(model.config.to_diff_dict())


def test_what_a_config_lacks_of_the_file_is_found(whole):
    """Only what transformers dropped: a config that says the same is served."""
    found = find_checkpoint(whole)
    found.header.fields["llama.attention.sliding_window"] = 64
    with pytest.raises(ValueError, match="attention.sliding_window=64"):
        read_config(found)
    text = read_config(find_checkpoint(whole))
    text.sliding_window = 64
    checkpoint._refuse_what_was_dropped("file", found.header, text)


def factors_of(rope, dim=16):
    """What llama.cpp's converter writes: plain frequencies over scaled ones."""
    text = LlamaConfig(hidden_size=dim, num_attention_heads=1, rope_scaling={"rope_theta": 10000.0, **rope})
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](text, "cpu")
    return 10000.0 ** (-torch.arange(0, dim, 2) / dim) / scaled


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192


@reads_gguf
@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3,
        LLAMA3 | {"factor": 32.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    ],
)
def test_scaled_positions_of_a_gguf_file_are_those_of_the_folder_it_was_made_from(tmp_path, rope):
    """transformers drops them; the text would be another one."""
    if rope["rope_type"] == "llama3":
        path = written(tmp_path, rope_freqs=factors_of(rope))
    else:
        said = {"type": rope["rope_type"], "factor": rope["factor"], "original_context_length": 256}
        if rope["factor"] == 2:
            del said["type"]
        path = written(tmp_path, **{f"llama__rope__scaling__{name}": value for name, value in said.items()})
    llm = ra.load(path, ra.RetrievalConfig(n_sink=4, n_local=16, exact_below=0, top_k=1 << 20))
    stock = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.arange(300)[None] % 90
    with torch.no_grad():
        plain = stock(ids).logits
        stock.config.rope_parameters = {"rope_theta": 10000.0, **rope}
        stock.model.rotary_emb = type(stock.model.rotary_emb)(stock.config)
        expected = stock(ids).logits
        ours = llm.model(ids, **cache_argument(llm.new_cache())).logits
    assert (ours - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-3
    assert llm.generate(ids[0].tolist(), max_new_tokens=2).token_ids
