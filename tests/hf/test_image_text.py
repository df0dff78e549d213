"""Models that see images, for their text side: what is loaded, and what they remember."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, sharpen
from transformers import LlamaConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import retrieval_attn as ra
from retrieval_attn.plan.terms import ModelShape
from retrieval_attn.terminal.plan_report import weight_bytes

CONFIG = ra.RetrievalConfig(index="exact", top_k=1 << 20, n_sink=4, n_local=16, exact_below=0, prefill_chunk=50)
TEXT = "The lighthouse keeper counts ships. " * 4


SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def saved(folder):
    """A tiny model of Qwen2-VL's kind, whose positions have three axes."""
    axes = {"type": "default", "mrope_section": [2, 3, 3]}
    text = {**SIZES, "intermediate_size": 96, "vocab_size": 320, "max_position_embeddings": 2048, "rope_scaling": axes}
    seeing = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4}
    torch.manual_seed(7)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=seeing)).eval()
    sharpen(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "qwen2_vl")


def answered(session, n_turns=2):
    for turn in range(n_turns):
        yield session.ask(f"{TEXT} And {turn}?", max_new_tokens=8).token_ids


def test_answers_are_those_of_stock(folder):
    llm = ra.load(folder, CONFIG, device="cpu")
    ids = torch.tensor([llm.encode([{"role": "user", "content": TEXT}])])
    stock = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    want = stock.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert llm.generate(ids[0].tolist(), max_new_tokens=8).token_ids == want


def test_sessions_in_turn_answer_as_each_alone(folder):
    llm = ra.load(folder, CONFIG, device="cpu")
    alone = list(answered(llm.session()))
    pairs = list(zip(answered(llm.session()), answered(llm.session()), strict=True))
    assert pairs == [(tokens, tokens) for tokens in alone]
    # What an image has left behind in the model, through other code: it shifts positions that nobody gives.
    llm.model.model.rope_deltas = torch.tensor([[-30]])
    assert list(answered(llm.session())) == alone


@pytest.mark.parametrize("part", ["visual.blocks.0.attn.qkv.weight", "layers.2.mlp.up_proj.weight"])
def test_missing_weights_of_either_side_are_refused(folder, tmp_path, part):
    broken = saved(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    gone = next(name for name in weights if name.endswith(part))
    save_file({name: weight for name, weight in weights.items() if name != gone}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks 1 of its weights, the first is .*{part}"):
        ra.load(broken)


def test_the_plan_is_of_the_text_side_and_counts_the_weights_of_both(folder):
    llm = ra.load(folder, CONFIG, device="cpu")
    text = llm.model.config.get_text_config()
    shape = ModelShape.of(llm.model.config, torch.float32)
    assert (shape.n_layers, shape.G, shape.D) == (text.num_hidden_layers, text.num_key_value_heads, 16)
    assert llm.max_tokens == text.max_position_embeddings
    assert weight_bytes(llm.model.config, torch.float32) == 4 * sum(p.numel() for p in llm.model.parameters())


def test_of_experts_for_text_and_images_those_for_text_count():
    # As ERNIE-4.5-VL says it.
    config = LlamaConfig(**SIZES, intermediate_size=96, num_experts_per_tok=2, moe_intermediate_size=[500, 9000])
    assert ModelShape.of(config, torch.float32).mlp == 2 * 500
