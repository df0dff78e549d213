"""`load` a model, then `generate`, `stream`, or hold a `session`."""

from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from retrieval_attn.batch import BatchRequest, is_batch, sampling_per_row, total_plan
from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.detokeniser import text_of
from retrieval_attn.generate import Completion, OnProgress, Request, longest_context
from retrieval_attn.hf.attention import NAME, register
from retrieval_attn.hf.cache import RetrievalCache, prefill_patterns
from retrieval_attn.hf.chat_template import render_messages
from retrieval_attn.hf.checkpoint import find_checkpoint, load_tokenizer, read_config
from retrieval_attn.hf.positions import warn_if_longer
from retrieval_attn.hf.rope import same_turning
from retrieval_attn.hf.weights import held_as, load_weights, weight_options
from retrieval_attn.kernels import HeadPattern
from retrieval_attn.plan.plan import MemoryPlan, plan_memory
from retrieval_attn.saving.session_files import restore_session
from retrieval_attn.session import Session
from retrieval_attn.threads.waiting import let_threads_sleep

Prompt = str | Tensor | Sequence[int] | Sequence[dict[str, str]]

Batch = list[str] | list[Tensor] | list[list[int]] | list[list[dict[str, str]]] | list[Prompt]

EMBEDDED = Path(__file__).parent / "embedded"


class LLM:
    """A causal language model whose full-attention layers retrieve. Made by `load`; reads and writes text.

    weights: how those of a GGUF file are held, "GGUF, packed" or "GGUF, unpacked"; empty for any other model.
    One request at a time per session; sessions in several threads are independent.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: RetrievalConfig,
        patterns: Sequence[Sequence[HeadPattern]] | None = None,
        weights: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.weights = weights
        # Kept: the file may change or go while conversations are held.
        self._patterns = patterns

    @property
    def max_tokens(self) -> int:
        """The longest context, prompt and answer together, that model and config allow."""
        return longest_context(self.model.config, self.config, self.model.dtype)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a text as it stands, chat messages through the model's template, ids unchanged.

        Raises ValueError if it is empty or longer than the model's maximum, or messages are given to a model without
        a chat template.
        """
        return self._encode_named(prompt, "the prompt", self.max_tokens)

    def _encode_named(self, prompt: Prompt, name: str, longest: int) -> list[int]:
        if not isinstance(prompt, str | Tensor | Sequence) or is_batch(prompt):
            raise ValueError(f"{name} must be a text, chat messages or token ids, got {_kind(prompt)}")
        ids = self._encode(prompt)
        if not ids:
            raise ValueError(f"{name} is empty; give at least one token")
        if len(ids) >= longest:
            raise ValueError(
                f"{name} has {len(ids)} tokens, the maximum is {longest} with at least one of them for the "
                "answer; shorten the text"
            )
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"token ids must be between 0 and {vocabulary - 1}, got {min(ids)} to {max(ids)} in {name}"
            )
        return ids

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt, verbose=False)["input_ids"])
        if isinstance(prompt, Tensor):
            return [int(i) for i in prompt.flatten()]
        if prompt and isinstance(prompt[0], dict):
            return self.encode_text(self.render(cast(list[dict[str, str]], prompt), add_generation_prompt=True))
        return [int(i) for i in cast(Sequence[int], prompt)]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text that already holds the special tokens it needs."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Chat messages as text, through the model's template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "the model's tokenizer has no chat template; give the prompt as a text instead of messages"
            )
        return render_messages(self.tokenizer, messages, add_generation_prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def plan(self, n_tokens: int) -> MemoryPlan:
        """The memory that a context of `n_tokens` will take."""
        return plan_memory(self.model.config, n_tokens, self.model.dtype, self.config)

    @overload
    def generate(self, prompt: Prompt, *, on_progress: OnProgress | None = ..., **sampling: Any) -> Completion: ...

    @overload
    def generate(self, prompt: Batch, *, on_progress: OnProgress | None = ..., **sampling: Any) -> list[Completion]: ...

    def generate(
        self, prompt: Prompt | Batch, *, on_progress: OnProgress | None = None, **sampling: Any
    ) -> Completion | list[Completion]:
        """Answer one prompt, or a list of prompts together, in order: a list of texts, of chats, or of lists of ids.

        Options: max_new_tokens=64, temperature=0.0, top_p=1.0, top_k=0, seed=0. In a list each prompt is answered as
        it would be alone, with the same seed; `seed` may also be a list of one for each. One thing differs: chunks of
        a prompt end elsewhere, on which int8 scales and sparse prefill depend. Shorter prompts are padded to the
        longest, so that those of like length go well together; prompts that a model with the rope type "dynamic" or
        "longrope" turns differently, because of their lengths, are answered one after the other. Token counts, bytes,
        index and `stop_reason` in the stats are the prompt's own; seconds, and what steps found, are those of all
        together.

        Raises ValueError for an empty or too long prompt (a list's are named by number, from 0) and bad options,
        MemoryError (before any work) if the machine lacks the memory.
        """
        if is_batch(prompt):
            return self._generate_batch(cast(Batch, prompt), on_progress, sampling)
        return self.session().answer(self.encode(cast(Prompt, prompt)), on_progress=on_progress, **sampling)

    def _generate_batch(
        self, prompts: Batch, on_progress: OnProgress | None, options: dict[str, Any]
    ) -> list[Completion]:
        samplings = sampling_per_row(options, len(prompts))
        longest = longest_context(self.model.config, self.config, self.model.dtype, len(prompts))
        ids = [self._encode_named(prompt, f"prompt {i}", longest) for i, prompt in enumerate(prompts)]
        n_new = [sampling.max_new_tokens for sampling in samplings]
        if not same_turning(self.model.config, [(len(row), len(row) + n) for row, n in zip(ids, n_new, strict=True)]):
            alone = zip(ids, samplings, strict=True)
            return [self.session().answer(row, on_progress=on_progress, **asdict(own)) for row, own in alone]
        total_plan([self.plan(len(row) + n) for row, n in zip(ids, n_new, strict=True)]).check()
        request = BatchRequest(self.model, self.new_cache(), self.stop_ids(), on_progress)
        rows = request.answer(ids, samplings)
        return [Completion(text_of(self.decode, row.answer), row.answer, row.stats) for row in rows]

    def stream(
        self, prompt: Prompt, *, on_progress: OnProgress | None = None, **sampling: Any
    ) -> Generator[str, None, None]:
        """Yield the answer to one prompt piece by piece; options as in `generate`."""
        return self.session().stream_answer(self.encode(prompt), on_progress=on_progress, **sampling)

    def session(self, system: str | None = None) -> Session:
        """A conversation that keeps its KV cache between turns."""
        return Session(self, system)

    def restore(self, directory: str | Path) -> Session:
        """A conversation saved by `Session.save`. Raises ValueError, with the reason, for anything else."""
        cache = self.new_cache()
        return Session.resumed(self, cache, restore_session(Path(directory), cache, self.model))

    def new_cache(self) -> RetrievalCache:
        """An empty cache for this model."""
        return RetrievalCache(self.model.config, self.config, self._patterns)

    def request(self, cache: RetrievalCache, on_progress: OnProgress | None, sampling: dict[str, Any]) -> Request:
        """A request against a cache, with this model's stop tokens."""
        return Request(self.model, cache, Sampling(**sampling), self.stop_ids(), on_progress)

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        eos = self.model.generation_config.eos_token_id
        ids = eos if isinstance(eos, list) else [eos]
        return [i for i in (*ids, self.tokenizer.eos_token_id) if i is not None]


def load(
    model: str | Path | None = None,
    config: RetrievalConfig | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights: str = "auto",
    rope: str | None = None,
) -> LLM:
    """Load a causal language model for retrieval, or the text side of one that sees images, too.

    model: None for the small model that ships with the package; else a local folder, a GGUF file or a folder that
    holds one, or a hub id. A GGUF file's own tokenizer and chat template are used, and nothing that lies beside it.
    device: "auto" takes CUDA if there is one, else the CPU. dtype: "auto" is the checkpoint's own; or "float32",
    "bfloat16", "float16". weights: "auto" as stored, "bf16", or "int8" / "int4" through bitsandbytes if installed.
    Of a GGUF file, "auto" keeps weights packed where transformers has a kernel for them on a GPU, and unpacks them
    otherwise ("bf16" always does; `LLM.weights` tells); its dtype "auto" is "float32" on a CPU, else "bfloat16".
    rope: None, or "yarn:4", "linear:2", "dynamic:2" scales positions, so that a text may be that many times as long as
    the model was trained for, with some loss on short ones. A config that scales them itself needs none.
    `config.threads` also sets PyTorch's thread count, which belongs to the process. Unless OMP_WAIT_POLICY,
    GOMP_SPINCOUNT or KMP_BLOCKTIME is set, OMP_WAIT_POLICY becomes PASSIVE in this process: threads sleep between
    loops. Those of torch, faiss and numba do only if they started later than `retrieval_attn.load` was imported; else
    a warning says so. `from retrieval_attn import load` and `import *` set it too, and child processes inherit it.

    Raises FileNotFoundError for a missing path, ValueError for a model that is no causal LM or whose attention
    cannot be served (named), whose weights are not all there (the first is named), or for a file of prefill patterns
    that is not for it, ImportError with the install command for a missing extra. Model code from a hub is never
    executed.
    """
    let_threads_sleep()
    config = config or RetrievalConfig()
    checkpoint = find_checkpoint(EMBEDDED if model is None else model)
    chosen = _choose_device(device)
    options = weight_options(checkpoint, weights, dtype, chosen)
    found = read_config(checkpoint, rope)
    warn_if_longer(found, config.max_tokens)
    # What a file of patterns has wrong is found out before the weights are read.
    patterns = prefill_patterns(found, config)
    register()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(checkpoint, found)
    loaded = load_weights(checkpoint, found, options, chosen, NAME)
    return LLM(loaded, tokenizer, config, patterns, held_as(checkpoint, loaded))


def _kind(prompt: Any) -> str:
    name = type(prompt).__name__
    return f"{name} of {type(prompt[0]).__name__}" if is_batch(prompt) else name


def _choose_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no CUDA device; use device='cpu' or 'auto'")
    return chosen
