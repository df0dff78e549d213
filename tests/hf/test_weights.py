"""A checkpoint without all of its weights is refused: transformers would draw the missing ones at random."""

import pytest
import torch
from laws import rarely
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_chat_model
from transformers import AutoConfig, AutoModelForCausalLM

import retrieval_attn as ra
from retrieval_attn.hf.versions import cache_argument


@pytest.fixture
def folder(tmp_path):
    return save_tiny_chat_model(tmp_path / "llama")


def change(folder, change_tensors):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_missing_weights_are_refused_by_name(folder):
    """A checkpoint that lacked 10 of 40 layers printed blanks, with exit status 0."""
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    with pytest.raises(ValueError, match=r"lacks 9 of its weights, the first is model.layers.1.input_layernorm.weight"):
        ra.load(folder)


def test_weights_of_another_shape_are_refused_by_name(folder):
    def cut(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name][:50].clone()

    change(folder, cut)
    message = "do not fit its config: 1 have other shapes than it says, the first is model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=message):
        ra.load(folder)


def test_a_tied_weight_is_not_missing(folder):
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert ra.load(folder).generate("a", max_new_tokens=1).token_ids


def test_other_weights_than_the_models_do_no_harm(folder):
    """As the layers that some checkpoints hold for drafting tokens."""
    change(folder, lambda tensors: tensors.update(draft=next(iter(tensors.values())).clone()))
    assert ra.load(folder).generate("a", max_new_tokens=1).token_ids


def test_a_damaged_pickle_is_refused_in_one_line(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    whole = (folder / "pytorch_model.bin").read_bytes()
    for content in (whole[: len(whole) // 2], b"not a pickle at all"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be loaded") as refused:
            ra.load(folder)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("weights", "most"), [("int4", 0.01), *rarely(("int8", 0.06))])
def test_quantised_weights_on_a_cpu(folder, caplog, weights, most):
    """The logits of stock attention with the same weights; and no line for every layer and token."""
    pytest.importorskip("bitsandbytes")
    ids = torch.arange(300)[None] % 90
    llm = ra.load(folder, ra.RetrievalConfig(n_sink=4, n_local=16, exact_below=0, top_k=300), weights=weights)
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=llm.model.config.quantization_config)
    assert "bit" in type(llm.model.model.layers[0].mlp.up_proj).__name__
    with torch.no_grad():
        expected, cache = stock(ids).logits[0, 280:], llm.new_cache()
        llm.model(ids[:, :280], **cache_argument(cache))
        ours = [llm.model(ids[:, i : i + 1], **cache_argument(cache)).logits[0, 0] for i in range(280, 300)]
    error = float((torch.stack(ours) - expected).norm() / expected.norm())
    # int8 rounds activations too, by outliers of all tokens of a pass. Without the far keys the error is 0.5.
    assert error < most
    assert "MatMul8bitLt" not in caplog.text
