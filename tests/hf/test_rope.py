"""Models that turn keys by the length of the text: whatever is read in whatever pieces, tokens equal stock's."""

import threading

import pytest
import torch
from tiny_models import VOCABULARY, byte_tokenizer, prompt_ids, sharpen
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import retrieval_attn as ra
from retrieval_attn.hf.rope import rope_border
from retrieval_attn.hf.versions import cache_argument
from retrieval_attn.llm import LLM

BORDER = 256
N_NEW = 6


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The configurations of "dynamic" models count only the tokens that need no stretching."""
    ra.register()
    for module in ("llm", "generate", "batch"):
        monkeypatch.setattr(f"retrieval_attn.{module}.longest_context", lambda *inputs: 32 * 1024)


def config(**options) -> ra.RetrievalConfig:
    return ra.RetrievalConfig(index="exact", top_k=1 << 20, n_sink=4, n_local=16, exact_below=0, **options)


def phi3(attention: str, border: int = BORDER):
    """Long factors that differ from the short ones enough to show."""
    # As model cards have it; transformers before 5.0 takes these three alone.
    rope = {
        "type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0],
    }
    # The published window, too: wider than any text.
    sizes = {"original_max_position_embeddings": border, "sliding_window": 262_144}
    return tiny(Phi3ForCausalLM, Phi3Config, rope, attention, **sizes)


def dynamic(attention: str):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return tiny(LlamaForCausalLM, LlamaConfig, rope, attention, max_position_embeddings=BORDER)


def tiny(model_class, config_class, rope, attention, **sizes):
    torch.manual_seed(7)
    sizes = {"max_position_embeddings": 32 * 1024} | sizes
    kept = config_class(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        rope_scaling=rope,
        **sizes,
    )
    model = model_class(kept).eval()
    sharpen(model)
    model.set_attn_implementation(attention)
    return model


def llm(model, **options) -> LLM:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return LLM(model, tokenizer, config(**options))


def stock(model, ids: list[int], n: int = N_NEW) -> list[int]:
    row = torch.tensor([ids])
    # Said, because `generate` takes padding ids within a text for padding.
    out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=n, do_sample=False)
    return out[0, len(ids) :].tolist()


def text(n: int, seed: int = 0) -> list[int]:
    return prompt_ids(n, seed)[0].tolist()


@pytest.mark.parametrize("chunk", [32, 128])
@pytest.mark.parametrize("length", [100, BORDER - 3, BORDER, BORDER + 1, 600])
def test_prompts_on_either_side_of_the_border_and_answers_across_it(length, chunk):
    ids = text(length)
    answer = llm(phi3("retrieval"), prefill_chunk=chunk).generate(ids, max_new_tokens=N_NEW)
    assert answer.token_ids == stock(phi3("sdpa"), ids)


@pytest.mark.parametrize("first", [100, 250, 300])
@pytest.mark.parametrize("more", [3, 20, 300])
def test_turns_across_the_border(first, more):
    session, ids = llm(phi3("retrieval"), prefill_chunk=64).session(), text(first)
    for new in (text(more, 1), text(more, 2)):
        answer = session.answer(ids, max_new_tokens=N_NEW).token_ids
        assert answer == stock(phi3("sdpa"), ids)
        ids = ids + answer + new


def test_only_the_turn_that_crosses_is_read_anew():
    session, reused = llm(phi3("retrieval"), prefill_chunk=64).session(), []
    for length in (200, 240, 300, 400, 230):
        assert session.answer(text(length), max_new_tokens=2).token_ids == stock(phi3("sdpa"), text(length), 2)
        reused.append(session.last.stats.reused_tokens)
    assert reused == [0, 200, 0, 300, 0]


def test_fork_and_restore_across_the_border(tmp_path):
    model, ids = llm(phi3("retrieval"), prefill_chunk=64), text(240)
    session = model.session()
    ids += session.answer(ids, max_new_tokens=4).token_ids
    session.save(tmp_path / "saved")
    longer, shorter = ids + text(50, 3), ids + text(3, 4)
    for twin in (session.fork(), model.restore(tmp_path / "saved")):
        assert twin.answer(longer, max_new_tokens=N_NEW).token_ids == stock(phi3("sdpa"), longer)
        assert session.answer(shorter, max_new_tokens=2).token_ids == stock(phi3("sdpa"), shorter, 2)
        again = longer + twin.last.token_ids + text(9, 5)
        assert twin.fork().answer(again, max_new_tokens=N_NEW).token_ids == stock(phi3("sdpa"), again)
        assert twin.last.stats.reused_tokens == 0


def test_an_interrupted_long_prompt_is_not_taken_for_a_short_one():
    session = llm(phi3("retrieval"), prefill_chunk=64).session()

    def stop_after_one_chunk(progress):
        if progress.done == 128:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            session.answer(text(600), max_new_tokens=N_NEW, on_progress=stop_after_one_chunk)
    # What was read is not read again.
    again = session.answer(text(600), max_new_tokens=N_NEW)
    assert again.stats.reused_tokens > 0
    assert again.token_ids == stock(phi3("sdpa"), text(600))
    assert session.answer(text(200), max_new_tokens=N_NEW).token_ids == stock(phi3("sdpa"), text(200))


@pytest.mark.parametrize("build", [phi3, dynamic])
def test_sessions_of_one_model_do_not_change_each_other(build):
    """In turns, and in threads at once."""
    model = llm(build("retrieval"), prefill_chunk=64)
    prompts = [text(n, n) for n in (700, 100, 400, 251, 300)]
    want = [stock(build("sdpa"), ids) for ids in prompts]
    assert [model.generate(ids, max_new_tokens=N_NEW).token_ids for ids in prompts] == want
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        found[i] = model.generate(prompts[i], max_new_tokens=N_NEW).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(prompts))] == want


@pytest.mark.parametrize("build", [phi3, dynamic])
@pytest.mark.parametrize("lengths", [(100, 200), (100, 600), (600, 300), (100, 253)])
def test_a_batch_is_answered_as_each_would_be_alone(build, lengths):
    prompts = [text(n, n) for n in lengths]
    answers = llm(build("retrieval"), prefill_chunk=64).generate(prompts, max_new_tokens=N_NEW)
    assert [answer.token_ids for answer in answers] == [stock(build("sdpa"), ids) for ids in prompts]


def test_the_model_is_left_as_it_was():
    model = phi3("retrieval")
    llm(model).generate(text(300), max_new_tokens=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_in_code_of_ones_own_a_text_that_crosses_in_pieces_is_refused():
    """transformers would leave the first piece turned as a short text."""
    model = phi3("retrieval")
    cache = ra.RetrievalCache(model.config, config())
    with torch.no_grad():
        model(torch.tensor([text(200)]), **cache_argument(cache))
        with pytest.raises(ValueError, match="a text of more than 256 tokens, which begins with this pass"):
            model(torch.tensor([text(57)]), **cache_argument(cache))
    cache = ra.RetrievalCache(model.config, config())
    with torch.no_grad():
        logits = model(torch.tensor([text(300)]), **cache_argument(cache)).logits[0, -1]
        torch.testing.assert_close(logits, phi3("sdpa")(torch.tensor([text(300)])).logits[0, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot go back to 200"):
        cache.crop(200 - cache.get_seq_length())


def test_that_generate_drops_the_cache_of_a_long_text_is_said():
    """Phi-3's own preparation of inputs does, where a text passes the border."""
    model = phi3("retrieval")
    cache = ra.RetrievalCache(model.config, config())
    with pytest.raises(ValueError, match="'generate' of this model drops a cache where a text passes 256 tokens"):
        model.generate(torch.tensor([text(300)]), **cache_argument(cache), max_new_tokens=2)


def test_other_models_have_no_border():
    assert rope_border(phi3("sdpa").config) == BORDER
    assert rope_border(dynamic("sdpa").config) is None


@pytest.mark.long
@pytest.mark.parametrize("chunk", [512, 2048])
@pytest.mark.parametrize("length", [4094, 4200, 6000, 12000])
def test_the_lengths_of_real_models(length, chunk):
    model, ids = llm(phi3("retrieval", 4096), prefill_chunk=chunk), text(length)
    session = model.session()
    for new in (text(30, 1), text(30, 2)):
        answer = session.answer(ids, max_new_tokens=12).token_ids
        assert answer == stock(phi3("sdpa", 4096), ids, 12)
        ids = ids + answer + new
    assert session.fork().answer(ids, max_new_tokens=12).token_ids == stock(phi3("sdpa", 4096), ids, 12)
