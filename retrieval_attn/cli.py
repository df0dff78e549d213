"""The `retrieval-attn` command. What a command needs is imported inside it, so that --help is quick."""

import importlib
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from typer.core import TyperGroup

from retrieval_attn.config import INDEX_KINDS, RetrievalConfig
from retrieval_attn.terminal.bar import PhaseBar
from retrieval_attn.terminal.chat import Chat
from retrieval_attn.terminal.files import is_a_person, is_session, read_text, remember_lines, session_folder
from retrieval_attn.terminal.shown import REPORTED, one_line, show_answer, stats_line

if TYPE_CHECKING:
    from retrieval_attn.llm import LLM
    from retrieval_attn.search_patterns import SearchedPatterns
    from retrieval_attn.session import Session


_BENCHMARKS = (
    "compare", "fidelity", "harness", "kernels", "latency", "long", "memory", "needle", "ppl", "recall", "report",
    "ruler", "scbench", "suite",
)  # fmt: skip


class _Benchmarks(TyperGroup):
    """Imports a benchmark only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_BENCHMARKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"retrieval_attn.bench.{cmd_name}.command")
        holder = typer.Typer(add_completion=False)
        holder.command(cmd_name, context_settings=getattr(module, "CONTEXT_SETTINGS", None))(module.command)
        return typer.main.get_command(holder)


app = typer.Typer(
    help="Talk to very long documents: the KV cache in CPU memory, found again by an attention-aware index.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench_app = typer.Typer(cls=_Benchmarks, help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def _bench() -> None:
    """Measure this machine."""


def _option(text: str, *names: str, panel: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


DTYPES = ("auto", "float32", "bfloat16", "float16")

MODEL, RETRIEVAL, MEMORY, ANSWER = "Model", "Retrieval", "Memory", "Answer"
Model = Annotated[str | None, _option("Folder or hub id (default: the embedded model)", "--model", "-m", panel=MODEL)]
Device = Annotated[str, _option("auto, cpu, cuda, cuda:1 ...", "--device", panel=MODEL)]
Dtype = Annotated[str, _option("auto, float32, bfloat16 or float16", "--dtype", panel=MODEL)]
Weights = Annotated[str, _option("auto, bf16, int8 or int4", "--weights", panel=MODEL)]
Index = Annotated[str | None, _option(f"{', '.join(INDEX_KINDS)} (default: graph)", "--index", panel=RETRIEVAL)]
Estimator = Annotated[str | None, _option("tail, lift or topk (default: tail)", "--estimator", panel=RETRIEVAL)]
Mass = Annotated[float | None, _option("Attention to recover, as 0.98 (default: fixed)", "--mass", panel=RETRIEVAL)]
VerifyEvery = Annotated[int | None, _option("Check each so many steps exactly", "--verify-every", panel=RETRIEVAL)]
TopK = Annotated[int | None, _option("Keys retrieved per head (default: 100)", "--top-k", panel=RETRIEVAL)]
NSink = Annotated[int | None, _option("First tokens kept near (default: 128)", "--n-sink", panel=RETRIEVAL)]
NLocal = Annotated[int | None, _option("Last tokens kept near (default: 512)", "--n-local", panel=RETRIEVAL)]
Prefill = Annotated[
    str | None, _option("dense, auto, a pattern, or a .json file (default: dense)", "--prefill", panel=RETRIEVAL)
]
Threads = Annotated[int | None, _option("CPU threads (default: all cores)", "--threads", panel=RETRIEVAL)]
Followup = Annotated[
    str | None, _option("Later turns read all: exact, or retrieve (default: exact)", "--followup", panel=RETRIEVAL)
]
KvDtype = Annotated[str | None, _option("auto, or int8 to store keys and values in half", "--kv-dtype", panel=MEMORY)]
KvDir = Annotated[str | None, _option("Folder for keys and values, on disk", "--kv-dir", panel=MEMORY)]
DeviceKvBudget = Annotated[
    str | None, _option("Keys and values that prefill keeps on the device, as 4g", "--device-kv-budget", panel=MEMORY)
]
MaxTokens = Annotated[int | None, _option("Longest context (default: the model's)", "--max-tokens", panel=MEMORY)]
MaxHostBytes = Annotated[
    str | None, _option("Most keys and values on the host, as 16g", "--max-host-bytes", panel=MEMORY)
]
MaxNewTokens = Annotated[int, _option("Longest answer (default: 512)", "--max-new-tokens", "-n", panel=ANSWER)]
Temperature = Annotated[float, _option("0 takes the likeliest token (default: 0)", "--temperature", panel=ANSWER)]
TopP = Annotated[float, _option("Draw from this share of probability (default: 1)", "--top-p", panel=ANSWER)]
Seed = Annotated[int, _option("Makes draws and index builds repeatable (default: 0)", "--seed", panel=ANSWER)]
Files = Annotated[list[Path] | None, typer.Option("--file", "-f", help="Read this file first; may be repeated.")]
Stats = Annotated[bool, typer.Option("--stats/--no-stats", help="A line of statistics after an answer.")]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        from retrieval_attn import __version__

        print(f"retrieval-attn {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def chat(
    model: Model = None,
    file: Files = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer, exit.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    session: Annotated[
        str | None,
        typer.Option(
            "--session", help="Name or folder: restored if it exists; /save writes to it, and so does --prompt."
        ),
    ] = None,
    stats: Stats = True,
    index: Index = None,
    top_k: TopK = None,
    estimator: Estimator = None,
    mass: Mass = None,
    verify_every: VerifyEvery = None,
    n_sink: NSink = None,
    n_local: NLocal = None,
    prefill: Prefill = None,
    followup: Followup = None,
    threads: Threads = None,
    kv_dtype: KvDtype = None,
    kv_dir: KvDir = None,
    device_kv_budget: DeviceKvBudget = None,
    max_tokens: MaxTokens = None,
    max_host_bytes: MaxHostBytes = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to a model about long texts. /help inside lists what can be done.

    Piped input is taken line by line, each line a turn; the exit status is 1 if one of them failed.
    """
    config = _config(
        index=index, top_k=top_k, estimator=estimator, mass=mass, verify_every=verify_every, n_sink=n_sink,
        n_local=n_local, prefill=prefill, followup=followup, threads=threads, kv_dtype=kv_dtype, kv_dir=kv_dir,
        device_kv_budget=parse_bytes(device_kv_budget, "--device-kv-budget"), max_tokens=max_tokens,
        max_host_bytes=parse_bytes(max_host_bytes, "--max-host-bytes"), seed=seed,
    )  # fmt: skip
    texts = _texts(file)
    folder = session_folder(session) if session is not None else None
    notes = Console(stderr=True) if prompt is not None else Console()
    llm = _load(notes, model, config, device=device, dtype=dtype, weights=weights)
    options = _sampling(max_new_tokens, temperature, top_p, seed)
    talk = Chat(
        _open(llm, folder, system, notes),
        Console(),
        notes=notes,
        options=options,
        stats=stats,
        folder=folder,
        interactive=prompt is None and is_a_person(),
    )
    if prompt is None:
        raise typer.Exit(_converse(talk, texts))
    _ask_once(talk, texts, prompt)


def _converse(talk: Chat, texts: dict[str, str]) -> int:
    if talk.interactive:
        remember_lines()
        talk.notes.print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", style="dim")
    if texts and not talk.attempt(lambda: talk.read(texts)) and not talk.interactive:
        return 1
    return talk.run()


def _ask_once(talk: Chat, texts: dict[str, str], prompt: str) -> None:
    if not prompt.strip():
        raise ValueError("--prompt is empty; say something")
    try:
        talk.read(texts)
        talk.ask(prompt)
        if talk.folder is not None:
            talk.session.save(talk.folder)
    finally:
        talk.session.cache.cancel_builds()


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; after the --file texts, if any. Default: standard input.")
    ] = None,
    model: Model = None,
    file: Files = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it stands, without chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, token ids and statistics as JSON.")] = False,
    stats: Stats = True,
    index: Index = None,
    top_k: TopK = None,
    estimator: Estimator = None,
    mass: Mass = None,
    verify_every: VerifyEvery = None,
    n_sink: NSink = None,
    n_local: NLocal = None,
    prefill: Prefill = None,
    followup: Followup = None,
    threads: Threads = None,
    kv_dtype: KvDtype = None,
    kv_dir: KvDir = None,
    device_kv_budget: DeviceKvBudget = None,
    max_tokens: MaxTokens = None,
    max_host_bytes: MaxHostBytes = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Answer one prompt. Only the answer goes to standard output."""
    config = _config(
        index=index, top_k=top_k, estimator=estimator, mass=mass, verify_every=verify_every, n_sink=n_sink,
        n_local=n_local, prefill=prefill, followup=followup, threads=threads, kv_dtype=kv_dtype, kv_dir=kv_dir,
        device_kv_budget=parse_bytes(device_kv_budget, "--device-kv-budget"), max_tokens=max_tokens,
        max_host_bytes=parse_bytes(max_host_bytes, "--max-host-bytes"), seed=seed,
    )  # fmt: skip
    text = _prompt(prompt, _texts(file))
    notes = Console(stderr=True)
    llm = _load(notes, model, config, device=device, dtype=dtype, weights=weights)
    options = _sampling(max_new_tokens, temperature, top_p, seed)
    templated = bool(llm.tokenizer.chat_template) and not raw
    session = llm.session()
    try:
        with PhaseBar(notes, session) as bar:
            ids = llm.encode([{"role": "user", "content": text}] if templated else text)
            pieces = session.stream_answer(ids, on_progress=bar, **options)
            show_answer((lambda piece: None) if as_json else _write, pieces, keep_blanks=not templated)
    finally:
        session.cache.cancel_builds()
    assert session.last is not None
    if as_json:
        done = session.last
        print(json.dumps({"text": done.text, "token_ids": done.token_ids, "stats": done.stats.as_dict()}))
    else:
        print()
    if stats:
        notes.print(stats_line(session.last.stats), style="dim", highlight=False, soft_wrap=True)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the document.", min=2048)] = 65536,
    questions: Annotated[int, typer.Option("--questions", help="Facts asked for.", min=1)] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Makes the document and the index repeatable.", min=0)] = 0,
    prefill: Annotated[str, typer.Option("--prefill", help="dense, auto, a pattern, or a .json file.")] = "dense",
) -> None:
    """Hide facts in a long document, ask for them, and compare with full attention in stock transformers."""
    console = Console()
    with _waiting(console, "importing"):
        _quiet_transformers()
        from retrieval_attn.bench.demo import run_demo
    raise typer.Exit(run_demo(tokens, questions, seed, console, prefill))


@app.command()
def estimate(
    context: Annotated[str, typer.Option("--context", "-c", help="Token counts; k = 1024, m = 1024 k.")] = "128k,1m",
    as_json: Annotated[bool, typer.Option("--json", help="Print every term of every phase as JSON.")] = False,
    device_memory: Annotated[
        str | None, _option("Of the device, as 24g or 16000m (default: what is free)", "--device-memory", panel=MODEL)
    ] = None,
    kv_dtype: KvDtype = None,
    kv_dir: KvDir = None,
    device_kv_budget: DeviceKvBudget = None,
    model: Model = None,
    index: Index = None,
    top_k: TopK = None,
    estimator: Estimator = None,
    n_sink: NSink = None,
    n_local: NLocal = None,
    prefill: Prefill = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
) -> None:
    """Print the memory that contexts will take, phase by phase, without loading the model's weights.

    The device may be one that this machine lacks: --device cuda --device-memory 24g.
    """
    from retrieval_attn.bench.shared.options import parse_contexts

    contexts = parse_contexts(context)
    with _waiting(Console(stderr=True), f"planning for {model or 'the embedded model'}"):
        _quiet_transformers()
        from retrieval_attn.terminal.plan_report import as_lines, as_table, estimate_memory

        config = _config(
            index=index, top_k=top_k, estimator=estimator, n_sink=n_sink, n_local=n_local, prefill=prefill,
            kv_dtype=kv_dtype, kv_dir=kv_dir, device_kv_budget=parse_bytes(device_kv_budget, "--device-kv-budget"),
        )  # fmt: skip
        memory = parse_bytes(device_memory, "--device-memory")
        found = estimate_memory(
            model, contexts, config, device=device, dtype=dtype, weights=weights, device_memory=memory
        )
    if as_json:
        print(json.dumps([one.as_dict() for one in found]))
        return
    Console().print(as_table(found))
    print("\n".join(line for one in found for line in as_lines(one)))


@app.command("search-patterns")
def search_patterns(
    text: Annotated[Path, typer.Option("--text", help="A text to try patterns on; best one like yours.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .json file to write, for --prefill.")],
    tokens: Annotated[int, typer.Option("--tokens", help="Read so many of its tokens.", min=2048)] = 16384,
    budget: Annotated[
        int | None, typer.Option("--budget", help="Keys read per query (default: 5120, at most a quarter of the text).")
    ] = None,
    model: Model = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
) -> None:
    """Find the pattern by which each head of a model prefills best, at a given cost.

    The model reads a text, and each head tries every pattern; that whose output is nearest to dense attention's wins.
    The file has the form in which MInference publishes its own. Ctrl-C leaves it as it was.
    """
    from retrieval_attn.attention.pattern_files import check_savable

    check_savable(out)
    read = read_text(str(text))
    notes = Console(stderr=True)
    llm = _load(notes, model, _config(threads=threads), device=device, dtype=dtype, weights=weights)
    found = _search(llm, llm.encode_text(read)[:tokens], budget, notes)
    found.save(out)
    Console().print(_table_of(found))
    print(f"{found.n_tokens} tokens read, {found.budget} keys per query; the patterns are in {out}")


def _search(llm: "LLM", ids: list[int], budget: int | None, notes: Console) -> "SearchedPatterns":
    from retrieval_attn.search_patterns import choose_budget, search_patterns

    # What is wrong is said before a bar is drawn.
    budget, ids = choose_budget(len(ids), budget), llm.encode(ids)
    with Progress(*Progress.get_default_columns(), console=notes) as bar:
        task = bar.add_task("trying patterns", total=None)
        return search_patterns(
            llm, ids, budget=budget, on_progress=lambda p: bar.update(task, completed=p.done, total=p.total)
        )


def _table_of(found: "SearchedPatterns") -> Table:
    """How many heads chose which pattern, and what that does to their outputs."""
    table = Table("pattern", *(Column(name, justify="right") for name in ("heads", "median error", "worst")))
    best = [tried for layer in found.best for tried in layer]
    for kind in ("a_shape", "vertical_slash", "block_sparse", "all"):
        errors = [tried.error for tried in best if kind in (tried.pattern.kind, "all")]
        if errors:
            table.add_row(kind, str(len(errors)), f"{100 * median(errors):.1f} %", f"{100 * max(errors):.1f} %")
    return table


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _texts(files: list[Path] | None) -> dict[str, str]:
    return {str(path): read_text(str(path)) for path in files or []}


def _prompt(prompt: str | None, texts: dict[str, str]) -> str:
    parts = [*texts.values(), *([prompt] if prompt is not None else [])]
    if not parts:
        if is_a_person():
            raise ValueError("there is no prompt; give one as an argument, with --file, or on standard input")
        parts = [sys.stdin.read()]
    text = "\n\n".join(parts)
    if not text.strip():
        raise ValueError("the prompt is empty; say something")
    return text


_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_bytes(text: str | None, flag: str) -> int | None:
    """A number of bytes such as "24g", "1.5g", "800m" or "0", with units of 1024; None stays None."""
    if text is None:
        return None
    unit = _UNITS.get(text[-1:].lower(), 1)
    try:
        n_bytes = int(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        n_bytes = -1
    if n_bytes < 0:
        raise ValueError(f"{flag} must be bytes such as 24g, 1.5g or 800m, got {text!r}")
    return n_bytes


def _config(**options: Any) -> RetrievalConfig:
    """A config from what was given on the command line; None leaves the default."""
    return RetrievalConfig(**{name: value for name, value in options.items() if value is not None})


def _sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    from retrieval_attn.generate import Sampling

    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    Sampling(**options)  # type: ignore[arg-type]
    return options


def _load(notes: Console, model: str | None, config: RetrievalConfig, **options: str) -> "LLM":
    if options["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {options['dtype']!r}")
    with _waiting(notes, f"loading {model or 'the embedded model'}"):
        _quiet_transformers()
        from retrieval_attn.llm import load

        return load(model, config, **options)


def _open(llm: "LLM", folder: Path | None, system: str | None, notes: Console) -> "Session":
    """The session saved in `folder`, if there is one, else a new one."""
    if folder is None or not is_session(folder):
        return llm.session(system)
    with _waiting(notes, f"loading {folder}"):
        restored = llm.restore(folder)
    if system is not None and system != restored.system:
        raise ValueError(f"the session in {folder} has its own system message; leave --system away")
    notes.print(
        f"loaded {folder}: {len(restored.token_ids)} tokens, {len(restored.messages)} messages",
        style="dim",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return restored


def _waiting(console: Console, what: str) -> AbstractContextManager[Any]:
    """A spinner, where someone sees it."""
    return console.status(what) if console.is_terminal else nullcontext()


def _quiet_transformers() -> None:
    """No warnings and no bars of transformers; downloads keep theirs."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script: runs a command and exits; what a person can mend is reported in one line."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Bytes and characters that a terminal's encoding lacks must not end a chat.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app(args=arguments)
    except SystemExit as leaving:
        if leaving.code == 130:
            _fail("interrupted", 130)
        raise
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except REPORTED as error:
        if os.environ.get("RETRIEVAL_ATTN_DEBUG") == "1":
            raise
        _fail(f"error: {one_line(error)}", 2)
    sys.exit(0)


if __name__ == "__main__":
    main()
