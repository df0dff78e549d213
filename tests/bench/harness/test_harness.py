"""`bench harness`: scores and answers as lm-evaluation-harness asks for them, and its own interface where installed."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny_chat_model
from transformers import AutoModelForCausalLM

from retrieval_attn import RetrievalConfig, load
from retrieval_attn.bench.harness.command import MODEL_ARGS, HarnessModel
from retrieval_attn.bench.harness.score import Pair, Scorer, answer_options, cut
from retrieval_attn.cli import main

EVERYTHING = 1 << 20
WHOLE = {"index": "exact", "top_k": EVERYTHING, "n_sink": 4, "n_local": 16, "exact_below": 0, "prefill_chunk": 50}
TEXT = "The lighthouse keeper counts ships. " * 12
END = " Then she rows home."


class Hook:
    """Stands in for lm_eval's, which sees each result as it comes."""

    def __init__(self):
        self.seen = []

    def add_partial(self, *what):
        self.seen.append(what)


def asked(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer(load(folder, RetrievalConfig(**WHOLE), dtype="float32"))


@pytest.fixture
def few(folder):
    """A scorer that retrieves few keys: its scores are not those of full attention."""
    config = RetrievalConfig(**WHOLE | {"index": "graph", "top_k": 4, "estimator": "topk"})
    return Scorer(load(folder, config, dtype="float32"))


@pytest.fixture
def model(folder):
    made = HarnessModel(str(folder), dtype="float32", **WHOLE)
    made.cache_hook = Hook()
    return made


def stock_score(model, pair):
    """What the harness's own model for transformers computes."""
    logits = model(torch.tensor([pair.context + pair.continuation[:-1]])).logits[0, -len(pair.continuation) :]
    tokens = torch.tensor(pair.continuation)
    log_probs = logits.double().log_softmax(-1)
    return float(log_probs.gather(1, tokens[:, None]).sum()), bool((logits.argmax(-1) == tokens).all())


def all_scores(scorer, pairs):
    found = dict(scorer.scores(pairs))
    return [found[i] for i in range(len(pairs))]


def forward_lengths(llm):
    """Record how many tokens each forward pass runs."""
    lengths = []
    handle = llm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths, handle


def test_blanks_before_a_continuation_are_scored_with_it(scorer):
    apart, together = scorer.pair("a b ", "c"), scorer.pair("a b", " c")
    assert apart == together
    assert scorer.llm.decode(together.continuation) == " c"
    assert scorer.pair("a \n ", "c").context == scorer.encode("a")


def test_an_empty_context_is_the_prefix_token(scorer):
    assert scorer.pair("", "abc") == ([scorer.prefix_id], scorer.encode("abc"))
    # Where the text begins with that token anyway, it is not doubled.
    assert scorer.pair("", "<|end|>abc") == ([scorer.prefix_id], scorer.encode("abc"))
    assert scorer.pair("  ", "abc") == ([scorer.prefix_id], scorer.encode("  abc"))


@pytest.mark.parametrize("context", ["", "abc", "<|end|>"])
def test_an_empty_continuation_is_an_error(scorer, context):
    with pytest.raises(ValueError, match="at least one token after its context, got ''"):
        scorer.pair(context, "")


@pytest.mark.parametrize("most", [1, 4, 5, 10, 100])
def test_windows_score_each_token_once_with_as_much_before_it_as_there_is_room(scorer, monkeypatch, most):
    monkeypatch.setattr(type(scorer.llm), "max_tokens", most)
    ids = scorer.encode("0123456789")
    windows = scorer.windows("0123456789")
    assert [token for window in windows for token in window.continuation] == ids
    whole = [scorer.prefix_id, *ids]
    done = 0
    for window in windows:
        done += len(window.continuation)
        run = window.context + window.continuation
        assert run == whole[done + 1 - len(run) : done + 1]
        assert len(run) - 1 == min(most, done)
    assert scorer.windows("") == []


def test_scores_are_those_of_full_attention_when_everything_is_retrieved(scorer, folder):
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    pairs = [scorer.pair(TEXT + end, more) for end in ("", "How many?") for more in (" a", " seven ships", END)]
    pairs += [scorer.pair("", "a"), scorer.pair("", TEXT[:40]), scorer.pair("x", "yz")]
    greedy = stock.generate(torch.tensor([pairs[0].context]), max_new_tokens=6, do_sample=False)[0]
    pairs.append(Pair(pairs[0].context, greedy[len(pairs[0].context) :].tolist()))
    found = all_scores(scorer, pairs)
    with torch.no_grad():
        wanted = [stock_score(stock, pair) for pair in pairs]
        double = [stock_score(stock.double(), pair)[0] for pair in pairs]
    assert [score.greedy for score in found] == [greedy for _, greedy in wanted]
    assert found[-1].greedy
    # Single tokens and blocks of them round differently; neither is nearer to the truth. Per token, in nats.
    lengths = [len(pair.continuation) for pair in pairs]
    ours = max(abs(a.log_prob - c) / n for a, c, n in zip(found, double, lengths, strict=True))
    theirs = max(abs(b - c) / n for (b, _), c, n in zip(wanted, double, lengths, strict=True))
    assert ours <= 2 * theirs


def test_even_a_single_token_rests_on_retrieval(scorer, few):
    pair = scorer.pair(TEXT + "Six", "a")
    assert len(pair.continuation) == 1
    ((_, exact),), ((_, retrieved),) = scorer.scores([pair]), few.scores([pair])
    assert abs(exact.log_prob - retrieved.log_prob) > 1e-3
    assert 0 < few.visited <= few.far


def test_scores_do_not_depend_on_order_nor_company(few):
    pairs = [few.pair(TEXT + end, more) for end in ("", "How many?") for more in (" a", END)]
    alone = [all_scores(few, [pair])[0] for pair in pairs]
    for seed in range(2):
        order = random.Random(seed).sample(range(len(pairs)), len(pairs))
        assert all_scores(few, [pairs[i] for i in order]) == [alone[i] for i in order]


def test_a_context_is_read_once_for_all_its_continuations(scorer):
    pairs = [scorer.pair(TEXT, more) for more in (" a", " bc", " def")]
    lengths, handle = forward_lengths(scorer.llm)
    all_scores(scorer, pairs)
    handle.remove()
    steps = 1 + sum(len(pair.continuation) - 1 for pair in pairs)
    assert sum(lengths) == len(pairs[0].context) - 1 + steps
    assert lengths[-steps:] == [1] * steps


def test_a_context_that_is_too_long_loses_its_beginning(scorer, monkeypatch, caplog):
    pair = scorer.pair(TEXT, "six")
    monkeypatch.setattr(type(scorer.llm), "max_tokens", 100)
    assert all_scores(scorer, [pair]) == all_scores(scorer, [Pair(pair.context[-98:], pair.continuation)])
    assert "its first 334 are left out" in caplog.text
    with pytest.raises(ValueError, match=r"at most 100 tokens \(the model's maximum\), got 432"):
        all_scores(scorer, [pair, scorer.pair("a", TEXT)])


def test_long_continuations_get_the_index_that_was_asked_for(few, monkeypatch):
    monkeypatch.setattr("retrieval_attn.bench.harness.score.LOOK_EVERY", 64)
    kinds = []
    note = few._note
    monkeypatch.setattr(few, "_note", lambda cache: (kinds.append({_kind(m) for m in cache.memories}), note(cache)))
    few.llm.config = RetrievalConfig(index="graph", n_sink=4, n_local=16, exact_below=96)
    all_scores(few, few.windows(TEXT[:280]))
    assert {"graph"} in kinds


def _kind(memory):
    index = memory.far_index.if_built
    return index and index.kind


def test_answers_are_those_of_generate_up_to_the_stop(scorer):
    whole = scorer.llm.generate(TEXT, max_new_tokens=24).text
    options = answer_options({"until": []}, 24)
    assert scorer.answer(TEXT, options) == whole
    stop = whole[5:8]
    lengths, handle = forward_lengths(scorer.llm)
    assert scorer.answer(TEXT, answer_options({"until": ["never said", stop]}, 24)) == whole.split(stop)[0]
    handle.remove()
    assert lengths.count(1) < 12


def test_a_stop_may_be_special_or_half_a_character(scorer):
    tokenizer = scorer.llm.tokenizer
    assert scorer._is_stopped(tokenizer("ab<|user|>")["input_ids"], ["<|user|>"])
    ids = tokenizer("ab…")["input_ids"]
    assert not scorer._is_stopped(ids[:-1], ["…"])
    assert scorer._is_stopped(ids, ["…"])
    assert not scorer._is_stopped(ids, [""])


@pytest.mark.parametrize(
    ("stops", "rest"), [([], "a\n\nb.c"), ([""], "a\n\nb.c"), (["."], "a\n\nb"), ([".", "\n\n"], "a"), (["a"], "")]
)
def test_the_first_stop_ends_the_text(stops, rest):
    assert cut("a\n\nb.c", stops) == rest


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 1}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.95}, 0.2),
        ({"temperature": 0.7}, 0.7),
    ],
)
def test_do_sample_and_temperature(given, temperature):
    options = answer_options({"until": "\n", "max_gen_toks": 7} | given, 256, seed=3)
    assert options.until == ["\n"]
    sampling = options.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.seed) == (7, temperature, 3)
    assert sampling.top_p == given.get("top_p", 1.0)


def test_options_that_cannot_be_served_are_named():
    assert answer_options({"num_beams": 1, "until": None, "max_new_tokens": 9}, 256).sampling.max_new_tokens == 9
    for given, says in [({"num_beams": 4}, "num_beams must be 1"), ({"typical_p": 1}, "'typical_p'; the options are")]:
        with pytest.raises(ValueError, match=says):
            answer_options(given, 256)


def test_an_answer_needs_room(scorer, monkeypatch):
    monkeypatch.setattr(type(scorer.llm), "max_tokens", 100)
    with pytest.raises(ValueError, match="shorter than 100 tokens"):
        scorer.answer(TEXT, answer_options({}, 100))
    last = TEXT[-90:]
    assert scorer.answer(TEXT, answer_options({}, 10)) == scorer.answer(last, answer_options({}, 10))


def test_the_model_answers_requests_in_order_and_tells_the_hook(model):
    requests = [asked(TEXT, " a"), asked("", "abc"), asked(TEXT, " seven")]
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert found == [
        tuple(score) for score in all_scores(model._scorer, [model._scorer.pair(*r.args) for r in requests])
    ]
    assert {what[1] for what in model.cache_hook.seen} == {request.args for request in requests}
    rolled = model.loglikelihood_rolling([asked("abc"), asked(""), asked("xyz")], disable_tqdm=True)
    assert rolled[0] == pytest.approx(found[1][0])
    assert rolled[1] == 0
    info = model.get_model_info()
    assert 0 < info["visited_fraction"] <= 1
    assert json.loads(json.dumps(info))["retrieval_config"]["top_k"] == EVERYTHING


def test_repeats_draw_anew_and_again_the_same(model):
    drawn = {"until": ["never said"], "do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    requests = [asked(TEXT, drawn)] * 2 + [asked("abc", drawn)]
    first = model.generate_until(requests, disable_tqdm=True)
    assert first[0] != first[1]
    assert model.generate_until(requests[::-1], disable_tqdm=True)[::-1] == [first[1], first[0], first[2]]
    with pytest.raises(ValueError, match="'stop'"):
        model.generate_until([*requests, asked("abc", {"stop": "a"})], disable_tqdm=True)


def test_chat_templates_are_the_tokenizers(model):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is"}]
    assert model.apply_chat_template(history[:1]) == "<|user|>Hi<|end|><|assistant|>"
    assert model.apply_chat_template(history, add_generation_prompt=False).endswith("<|assistant|>The answer is")
    assert "add_generation_prompt" in model.chat_template(True)
    assert model.chat_template(False) is None
    assert "/" not in model.tokenizer_name
    with pytest.raises(ValueError, match="leave the name 'rag' away"):
        model.chat_template("rag")


def test_an_unknown_model_argument_is_one_line_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown model argument 'topk'; did you mean top_k\? There are pretrained, device"
    ) as caught:
        HarnessModel(topk=3)
    assert all(name in str(caught.value) for name in MODEL_ARGS)
    with pytest.raises(ValueError, match="index must be one of"):
        HarnessModel(index="hnsw")


def test_model_args_are_words_of_the_one_option_language(folder):
    made = HarnessModel.create_from_arg_obj({"pretrained": str(folder), "n_local": "1k", "top_k": 7})
    assert (made.llm.config.n_local, made.llm.config.top_k) == (1024, 7)
    with pytest.raises(ValueError, match="n_local must be tokens such as 8k"):
        HarnessModel(n_local="lots")


def test_model_args_have_the_last_word_on_the_device(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made = HarnessModel.create_from_arg_obj({"pretrained": str(folder)}, {"device": "cuda:0", "batch_size": None})
    assert made.llm.model.device.type == "cpu"
    HarnessModel.create_from_arg_obj({"pretrained": str(folder), "device": "cpu"}, {"device": "mps"})
    with pytest.raises(ValueError, match="sees no CUDA device"):
        HarnessModel.create_from_arg_obj({"pretrained": str(folder), "device": "cuda"}, {"device": "cuda:0"})


def test_help_needs_no_lm_eval(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "harness", "--help"])
    assert "--model_args" in capsys.readouterr().out


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "harness", "--model", "retrieval", "--tasks", "x"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: bench harness needs lm-eval; pip install 'retrieval-attn[eval]'\n"


def test_lm_evals_own_rules_for_pairs_and_windows(model):
    harness = pytest.importorskip("lm_eval.api.model")
    utils = pytest.importorskip("lm_eval.utils")
    scorer = model._scorer
    for context, continuation in [("a b ", "c"), ("a b", " c"), ("a\n\n", "c d"), (TEXT, TEXT)]:
        own = SimpleNamespace(backend="causal", tok_encode=scorer.encode)
        assert harness.TemplateLM._encode_pair(own, context, continuation) == tuple(scorer.pair(context, continuation))
    for most in (3, 7, 10, 11, 50):
        windows = utils.get_rolling_token_windows(scorer.encode("0123456789"), scorer.prefix_id, most, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(scorer.llm), "max_tokens", most)
            assert scorer.windows("0123456789") == [utils.make_disjoint_window(window) for window in windows]


def test_lm_eval_runs_a_task_through_the_command(folder, tmp_path):
    pytest.importorskip("lm_eval")
    docs = [{"q": TEXT + "How many?", "choices": ["six", "seven ships"], "gold": i} for i in range(2)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "ships.yaml").write_text(
        f"task: ships\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'docs.jsonl'}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    )
    words = ["--model", "retrieval", "--tasks", "ships", "--include_path", str(tmp_path)]
    words += ["--model_args", f"pretrained={folder},index=exact,top_k=8", "--output_path", str(tmp_path / "out.json")]
    before = sys.argv
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "harness", *words])
    assert sys.argv is before
    (found,) = tmp_path.glob("out*.json")
    results = json.loads(found.read_text())
    assert results["results"]["ships"]["acc,none"] == 0.5
    assert results["config"]["retrieval_config"]["top_k"] == 8
