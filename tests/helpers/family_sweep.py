"""Which families give stock's logits when all keys are read, which are refused: `python family_sweep.py [TYPE ...]`."""

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from families import IMAGE_TYPES, TYPES, tiny
from tiny_models import byte_tokenizer
from transformers import AutoConfig

import retrieval_attn as ra
from retrieval_attn.hf.attention import watched_attention
from retrieval_attn.hf.auto_class import auto_class
from retrieval_attn.hf.versions import cache_argument

MOST_PARAMETERS, MOST_BYTES, MOST_SECONDS = 60_000_000, 6 << 30, 120
N_PROMPT, N_NEW, TOLERANCE = 300, 5, 1e-3


# In names of weights; what attention gives passes through more before it is added, in Zamba.
_OF_ATTENTION = ("attn", "attention", "shared_transf", ".linear.")


class Result(NamedTuple):
    """How a family fared: "equal", "refused" (by its name, before weights are read), or what is wrong.

    That is "unclear" (refused without its name), "late" (an error, of whatever kind, after weights were read), "wrong"
    (another text), "not tried" (stock does not run here). reason: why. error: the largest relative error of logits.
    blunt: what leaving out the far keys changes. mass: share of the attention that the best 32 keys hold.
    """

    family: str
    result: str
    reason: str = ""
    error: float = 0.0
    blunt: float = 0.0
    mass: float = 0.0


def config(top_k: int = 1 << 20, **options: Any) -> ra.RetrievalConfig:
    return ra.RetrievalConfig(
        index="exact", top_k=top_k, n_sink=4, n_local=16, exact_below=0, prefill_tile=100, **options
    )


def prompt(n: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (batch, n), generator=torch.Generator().manual_seed(seed))


class Wrong(Exception):
    """A check that found another text than stock's."""


def stock_model(family: str) -> Any:
    """A random model whose best 32 keys hold about half of the attention."""
    shrunk = tiny(family)
    with torch.device("meta"):
        n = sum(p.numel() for p in auto_class(shrunk).from_config(shrunk).parameters())
    if n > MOST_PARAMETERS:
        raise MemoryError(f"the tiny model has {n} parameters")
    torch.manual_seed(7)
    model = auto_class(shrunk).from_config(tiny(family), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def attention_parts(module: torch.nn.Module) -> list[torch.Tensor]:
    names = ("q_", "k_", "query", "key", "qkv", "c_attn", "Wqkv", "q_norm", "k_norm", "in_proj", "wq", "wk")
    return [p for name, p in module.named_parameters() if any(part in name for part in names) and "bias" not in name]


def spread(weights: torch.Tensor) -> float:
    """Share of the best 32 keys for the later queries: weights (B, H, T, S)."""
    return float(weights[:, :, 150:].topk(32).values.sum(-1).mean())


@torch.no_grad()
def sharpen(model: Any) -> float:
    """Scale queries and keys until the best 32 hold about half; returns what they hold, 0 if that cannot be told."""
    masses: list[float] = []

    def watched(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, scaling: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
        T, S = scores.shape[-2:]
        scores += torch.full((T, S), -torch.inf).triu(S - T + 1)
        sinks = kwargs.get("s_aux")
        whole = (
            scores if sinks is None else torch.cat([scores, sinks[None, :, None, None].expand_as(scores[..., :1])], -1)
        )
        weights = whole.softmax(-1)[..., :S]
        masses.append(spread(weights))
        if adjust:
            std = torch.stack([scores[..., i, : i + 1].std() for i in range(150, T, 10)]).mean()
            for part in attention_parts(module):
                part.mul_(float((1.5 / std.clamp(min=1e-6)).sqrt()))
        out = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return out.transpose(1, 2).contiguous(), None

    adjust = False
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and weight.std() > 0 and any(part in name for part in _OF_ATTENTION):
            weight.mul_(1 / weight.std().clamp(min=1e-6) / weight.shape[1] ** 0.5)
        if name.endswith(".temp"):
            # Zero as it is drawn, and with it all of Zaya's keys.
            weight.fill_(1.3)
        if name.endswith("sinks"):
            # As they are drawn, leaving them out would hardly show.
            weight.fill_(5.0)
    for adjusting in (True, True, False):
        adjust = adjusting
        masses.clear()
        try:
            with watched_attention(model, watched, takes_sinks=True):
                model(prompt(N_PROMPT), use_cache=False)
        except ValueError:
            # A part for images or sound takes no attention function; the scale above has to do.
            return 0.0
    return sum(masses) / max(1, len(masses))


class Heard:
    """The last logits of every forward pass."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[torch.Tensor] = []

    def __enter__(self) -> "Heard":
        self.handle = self.model.register_forward_hook(
            lambda module, args, out: self.rows.append(out.logits[:, -1].detach())
        )
        return self

    def __exit__(self, *failure: Any) -> None:
        self.handle.remove()

    def last(self, n: int) -> torch.Tensor:
        rows, self.rows = self.rows[-n:], []
        return torch.stack(rows)


@torch.no_grad()
def generated(model: Any, ids: torch.Tensor, cache: Any = None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens (B, n) and their logits (n, B, V)."""
    passed = {} if cache is None else cache_argument(cache)
    out = model.generate(
        ids,
        **passed,
        max_new_tokens=N_NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


class Referee:
    """Compares with stock and remembers the largest error."""

    def __init__(self) -> None:
        self.error = 0.0

    def __call__(self, what: str, ours: torch.Tensor, stock: torch.Tensor) -> None:
        n = min(len(ours), len(stock))
        error = float((ours[:n] - stock[:n]).abs().max() / stock.abs().max())
        if not error < TOLERANCE:
            raise Wrong(f"{what}: relative error {error:.1e}")
        self.error = max(self.error, error)


def own_code(folder: Path, stock: Any, referee: Referee) -> float:
    """All ways through transformers' own `generate`; returns what leaving out far keys changes."""
    ra.register()
    auto = auto_class(AutoConfig.from_pretrained(folder))
    model = auto.from_pretrained(folder, attn_implementation="retrieval").eval()
    ids = prompt(N_PROMPT)
    one = generated(stock, ids)[1]
    cache = ra.RetrievalCache(model.config, config())
    answer, ours = generated(model, ids, cache)
    referee("one pass", ours, one)
    longer = torch.cat([ids, answer, prompt(20, 1)], 1)
    referee("follow-up", generated(model, longer, cache)[1], generated(stock, longer)[1])
    cache = ra.RetrievalCache(model.config, config())
    referee("chunks", generated(model, ids, cache, prefill_chunk_size=64)[1], one)
    rows = prompt(N_PROMPT, 2, batch=2)
    mask = torch.ones_like(rows)
    rows[1, :100], mask[1, :100] = 0, 0
    cache = ra.RetrievalCache(model.config, config())
    referee(
        "batch", generated(model, rows, cache, attention_mask=mask)[1], generated(stock, rows, attention_mask=mask)[1]
    )
    few = generated(model, ids, ra.RetrievalCache(model.config, config(top_k=1, estimator="topk")))[1]
    return float((few - one).abs().max() / one.abs().max())


def loaded(folder: Path, stock: Any, referee: Referee) -> None:
    """All ways through `load`."""
    ids = prompt(N_PROMPT)
    one, chunked = ra.load(folder, config(), device="cpu"), ra.load(folder, config(prefill_chunk=64), device="cpu")
    want = generated(stock, ids)[1]
    for name, llm in (("load, one pass", one), ("load, chunks", chunked)):
        with Heard(llm.model) as heard:
            session = llm.session()
            answer = session.answer(ids[0].tolist(), max_new_tokens=N_NEW)
            referee(name, heard.last(N_NEW), want)
            more = ids[0].tolist() + answer.token_ids + prompt(20, 1)[0].tolist()
            session.answer(more, max_new_tokens=N_NEW)
            referee(f"{name}, follow-up", heard.last(N_NEW), generated(stock, torch.tensor([more]))[1])
    rows = [ids[0].tolist(), prompt(200, 2)[0].tolist()]
    with Heard(chunked.model) as heard:
        try:
            chunked.generate(rows, max_new_tokens=N_NEW)
        except ValueError as reason:
            if "recurrent state" not in str(reason):
                raise
            return
        both = heard.last(N_NEW)
    for i, row in enumerate(rows):
        referee("load, batch", both[:, i : i + 1], generated(stock, torch.tensor([row]))[1])


def judged(family: str, folder: Path) -> Result:
    """What becomes of a family: refused from its configuration alone, or compared with stock."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    tiny(family).save_pretrained(folder)
    if said := refusal(folder):
        return Result(family, "refused" if said.startswith(f"'{family}' ") else "unclear", said)
    try:
        stock = stock_model(family)
        mass = sharpen(stock)
        generated(stock, prompt(N_PROMPT))
    except Exception as error:
        return Result(family, "not tried", told(error))
    stock.save_pretrained(folder)
    # Of some models only the part for text was made, whose configuration has another type.
    tiny(family).save_pretrained(folder)
    return compared(family, folder, stock, mass)


def refusal(folder: Path) -> str:
    """What `load` says where there are no weights, if that is a refusal of the model; empty if it would load it."""
    try:
        ra.load(folder, config(), device="cpu")
    except ValueError as error:
        return str(error).replace(str(folder), "...") if "safetensors" not in str(error) else ""
    return ""


def told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return " ".join(f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})".split())[:300]


def compared(family: str, folder: Path, stock: Any, mass: float) -> Result:
    referee, blunt = Referee(), 0.0
    for seam in (own_code, loaded):
        try:
            blunt = seam(folder, stock, referee) or blunt
        except Wrong as error:
            return Result(family, "wrong", str(error), referee.error, blunt, mass)
        except Exception as error:
            return Result(family, "late", f"{seam.__name__}: {told(error)}", referee.error, blunt, mass)
    return Result(family, "equal", "", referee.error, blunt, mass)


def in_a_child(family: str) -> Result:
    """Judge a family in a process with limits."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES * 64, MOST_BYTES * 64))
        signal.alarm(MOST_SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            result = judged(family, Path(folder))
        os.write(writer, json.dumps(result._asdict()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return Result(**json.loads(text)) if text else Result(family, "late", f"the process ended with {status}")


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for family in sys.argv[1:] or TYPES:
        kind = "image-text" if family in IMAGE_TYPES else "text"
        print(json.dumps({**in_a_child(family)._asdict(), "kind": kind}), flush=True)


if __name__ == "__main__":
    main()
