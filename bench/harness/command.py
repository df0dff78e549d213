"""`retrieval-attn bench harness`: lm-evaluation-harness drives a model that retrieves, as `--model retrieval`."""

import functools
import importlib.util
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Self

import torch
import typer
from tqdm import tqdm

from retrieval_attn.bench.harness.score import AnswerOptions, Pair, Score, Scorer, answer_options
from retrieval_attn.config import RetrievalConfig
from retrieval_attn.llm import load
from retrieval_attn.terminal.option_language import unknown, words_of

log = logging.getLogger("retrieval_attn")

# The command's arguments are lm_eval's own; after a word that is no option, even --help is.
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

MODEL_ARGS = ("pretrained", "device", "dtype", "weights", "max_gen_toks", *words_of(RetrievalConfig))


def command(context: typer.Context) -> None:
    """Run lm-evaluation-harness, which the extra "eval" installs; all arguments are its own.

    retrieval-attn bench harness --model retrieval --model_args index=scan,top_k=200 --tasks TASK

    Model arguments are pretrained (default: the embedded model), device, dtype, weights, max_gen_toks, and the fields
    of RetrievalConfig. `retrieval-attn bench harness run --help` shows lm_eval's options. One request runs at a time.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    with _arguments(context.args):
        cli_evaluate()


@contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    """lm_eval reads the process's own."""
    before = sys.argv
    sys.argv = ["lm-eval", *words]
    try:
        yield
    finally:
        sys.argv = before


@functools.cache
def register() -> type:
    """Make the model "retrieval" known to lm_eval, for `lm_eval.simple_evaluate(model="retrieval", ...)`, too.

    Returns its class: lm_eval's `LM` with what `HarnessModel` does. Raises ImportError without lm_eval.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("bench harness needs lm-eval; pip install 'retrieval-attn[eval]'")
    # lm_eval makes its own models known only while the registry is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    class RetrievalLM(HarnessModel, LM):
        """`HarnessModel` where lm_eval looks for it."""

    register_model("retrieval")(RetrievalLM)
    return RetrievalLM


class HarnessModel:
    """The methods that lm_eval asks a model for. Requests have `args`, as lm_eval's `Instance` has.

    Every request is a prompt of its own: the field `followup` changes nothing. Results do not depend on the order of
    requests, nor on which others there are.
    """

    cache_hook: Any
    _device: Any

    def __init__(
        self,
        pretrained: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        weights: str = "auto",
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **config: Any,
    ) -> None:
        """pretrained, device, dtype, weights: as of `load`; None or "" for the embedded model.

        max_gen_toks: longest answer where a task does not say. config: fields of `RetrievalConfig`.

        batch_size and max_batch_size come from lm_eval's command line; requests run one at a time whatever they say.
        Raises ValueError for other names, and as `load`.
        """
        super().__init__()
        words = words_of(RetrievalConfig)
        if none := sorted(set(config) - set(words)):
            raise ValueError(unknown("model argument", none[0], MODEL_ARGS))
        if batch_size not in (1, "1"):
            log.warning("requests run one at a time; batch_size=%s changes nothing", batch_size)
        # What lm_eval read as a number is one.
        own = {name: words[name].parse(value) if isinstance(value, str) else value for name, value in config.items()}
        self.max_gen_toks = max_gen_toks
        self.llm = load(pretrained or None, RetrievalConfig(**own), device=device, dtype=dtype, weights=weights)
        self.tokenizer = self.llm.tokenizer
        self._scorer = Scorer(self.llm)
        self._device = self.llm.model.device

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """A model from --model_args, which have the last word, and what else lm_eval's command line says.

        Without CUDA, a CUDA device named there gives way to "auto", because lm_eval names one when nobody did.
        """
        said = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(said.get("device")).startswith("cuda") and not torch.cuda.is_available():
            log.info("PyTorch sees no CUDA device; device=%s is taken for 'auto'", said["device"])
            said["device"] = "auto"
        return cls(**said | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """As `create_from_arg_obj`, from text such as "index=scan,top_k=200"."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether it is the greedy one; see `Scorer.pair` and `scores`."""
        pairs = [self._scorer.pair(*request.args) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        for i, score in self._scores(pairs, "loglikelihood", disable_tqdm):
            found[i] = (score.log_prob, score.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each text, token by token, every one of them a step that retrieves."""
        windows = [self._scorer.windows(*request.args) for request in requests]
        owners = [i for i, own in enumerate(windows) for _ in own]
        totals = [0.0] * len(requests)
        pairs = [pair for own in windows for pair in own]
        scores = dict(self._scores(pairs, "loglikelihood_rolling", disable_tqdm))
        for n, owner in enumerate(owners):
            totals[owner] += scores[n].log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _scores(self, pairs: list[Pair], name: str, quiet: bool) -> Iterator[tuple[int, Score]]:
        return iter(tqdm(self._scorer.scores(pairs), name, total=len(pairs), disable=quiet))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, cut before the first stop string.

        A request that is repeated draws anew, by the seeds 0, 1, 2 ... unless its options name one.
        """
        # All options first: a bad one is found before any work.
        options = self._options([request.args for request in requests])
        answers = []
        for request, own in zip(tqdm(requests, "generate_until", disable=disable_tqdm), options, strict=True):
            answers.append(self._scorer.answer(request.args[0], own))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _options(self, asked: list[tuple[str, dict[str, Any]]]) -> list[AnswerOptions]:
        times = Counter[str]()
        options = []
        for context, given in asked:
            key = repr((context, given))
            options.append(answer_options(given, self.max_gen_toks, seed=times[key]))
            times[key] += 1
        return options

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text; without a generation prompt, the last one is left open to be continued."""
        if add_generation_prompt:
            return self.llm.render(chat_history, add_generation_prompt=True)
        self.chat_template(True)
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, continue_final_message=True))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, which lm_eval logs; None if none is to be used.

        Raises ValueError if there is none to use, or one is asked for by name.
        """
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            raise ValueError(f"the tokenizer's own chat template is used; leave the name {chat_template!r} away")
        if not self.tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template; leave --apply_chat_template away")
        return str(self.tokenizer.chat_template)

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval tells cached requests of one tokenizer from those of another by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """For lm_eval's results: the config, and what all steps so far did.

        visited_fraction: share of the far keys that were looked at. None if there never were any, because every context
        fitted into the window; the results then say nothing about retrieval.
        """
        far, visited = self._scorer.far, self._scorer.visited
        return {
            "model_dtype": str(self.llm.model.dtype),
            "model_num_parameters": self.llm.model.num_parameters(),
            "retrieval_config": asdict(self.llm.config),
            "visited_fraction": visited / far if far else None,
        }
