"""The `retrieval-attn` command. What a command needs is imported inside it, so that --help is quick."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from retrieval_attn.config import RetrievalConfig, Sampling
from retrieval_attn.terminal.chat import Chat
from retrieval_attn.terminal.files import is_a_person, read_text, session_folder
from retrieval_attn.terminal.opening import (
    hide_bars,
    load_model,
    open_session,
    quiet_transformers,
    read_prompt,
    read_texts,
    waiting,
)
from retrieval_attn.terminal.options import MODEL, Fields, ModelOptions, option, with_options
from retrieval_attn.terminal.shown import REPORTED, one_line
from retrieval_attn.terminal.units import parse_bytes, parse_length, parse_lengths
from retrieval_attn.threads.waiting import let_threads_sleep

_BENCHMARKS = (
    "compare fidelity gpu-check harness kernels latency long memory needle ppl recall report ruler scbench suite"
)


class _Benchmarks(TyperGroup):
    """Imports a benchmark only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return _BENCHMARKS.split()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        # lm-evaluation-harness says with bars of its own how far it is.
        if cmd_name != "harness":
            hide_bars()
        module = importlib.import_module(f"retrieval_attn.bench.{cmd_name.replace('-', '_')}.command")
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


Files = Annotated[list[Path] | None, option("Read this file first; may be repeated.", "--file", "-f")]
Stats = Annotated[bool, option("A line of statistics after an answer.", "--stats/--no-stats")]
LongAnswers = Annotated[Sampling, Fields(max_new_tokens=512)]


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
@with_options
def chat(
    model: ModelOptions,
    config: RetrievalConfig,
    sampling: LongAnswers,
    file: Files = None,
    prompt: Annotated[str | None, option("Ask this, print the answer, exit.", "--prompt", "-p")] = None,
    system: Annotated[str | None, option("System message.", "--system")] = None,
    session: Annotated[
        str | None,
        option("Name or folder: restored if it exists; /save writes to it, and so does --prompt.", "--session"),
    ] = None,
    stats: Stats = True,
) -> None:
    """Talk to a model about long texts. /help inside lists what can be done.

    Piped input is taken line by line, each line a turn; the exit status is 1 if one of them failed.
    """
    texts = read_texts(file)
    folder = session_folder(session) if session is not None else None
    notes = Console(stderr=True) if prompt is not None else Console()
    talk = Chat(
        open_session(load_model(notes, model, config), folder, system, notes),
        Console(),
        notes=notes,
        sampling=sampling,
        stats=stats,
        folder=folder,
        interactive=prompt is None and is_a_person(),
    )
    if prompt is None:
        raise typer.Exit(talk.converse(texts))
    talk.ask_once(texts, prompt)


@app.command()
@with_options
def generate(
    model: ModelOptions,
    config: RetrievalConfig,
    sampling: LongAnswers,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; after the --file texts, if any. Default: standard input.")
    ] = None,
    file: Files = None,
    raw: Annotated[bool, option("Give the prompt as it stands, without chat template.", "--raw")] = False,
    as_json: Annotated[bool, option("Print text, token ids and statistics as JSON.", "--json")] = False,
    stats: Stats = True,
) -> None:
    """Answer one prompt. Only the answer goes to standard output."""
    text, notes = read_prompt(prompt, read_texts(file)), Console(stderr=True)
    llm = load_model(notes, model, config)
    from retrieval_attn.terminal.one_answer import print_answer

    print_answer(llm, text, sampling, notes, raw=raw, as_json=as_json, stats=stats)


@app.command()
@with_options
def demo(
    config: Annotated[RetrievalConfig, Fields("index", "top_k", "prefill", "threads", "seed")],
    tokens: Annotated[str, option("Length of the document; k = 1024.", "--tokens")] = "64k",
    questions: Annotated[int, option("Facts asked for.", "--questions")] = 3,
) -> None:
    """Hide facts in a long document, ask for them, and compare with full attention in stock transformers."""
    from retrieval_attn.bench.shared.options import at_least

    # A shorter document is not worth it.
    length, console = parse_length(tokens, "--tokens", least=2048), Console()
    at_least(questions, 1, "--questions")
    with waiting(console, "importing"):
        quiet_transformers()
        from retrieval_attn.bench.demo import run_demo
    raise typer.Exit(run_demo(length, questions, config, console))


@app.command()
@with_options
def estimate(
    model: ModelOptions,
    config: RetrievalConfig,
    context: Annotated[str, option("Token counts; k = 1024, m = 1024 k.", "--context", "-c")] = "128k,1m",
    as_json: Annotated[bool, option("Print every term of every phase as JSON.", "--json")] = False,
    device_memory: Annotated[
        str | None,
        option("Bytes of the device, as 24g or 16000m.", "--device-memory", panel=MODEL, default="what is free"),
    ] = None,
    host_memory: Annotated[
        str | None,
        option("Bytes of CPU memory, as 64g.", "--host-memory", panel=MODEL, default="what is free"),
    ] = None,
) -> None:
    """Print the memory that contexts will take, phase by phase, without loading the model's weights.

    The machine may be another than this: --device cuda --device-memory 24g --host-memory 64g. The exit status is 1 if
    a context does not fit.
    """
    contexts = parse_lengths(context, "--context")
    on_device, on_host = (
        None if given is None else parse_bytes(given, name)
        for given, name in ((device_memory, "--device-memory"), (host_memory, "--host-memory"))
    )
    with waiting(Console(stderr=True), f"planning for {model.model or 'the embedded model'}"):
        quiet_transformers()
        from retrieval_attn.terminal.plan_report import as_lines, as_table, estimate_memory

        found = estimate_memory(
            model.model,
            contexts,
            config,
            device=model.device,
            dtype=model.dtype,
            weights=model.weights,
            device_memory=on_device,
            host_memory=on_host,
            rope=model.rope,
        )
    if as_json:
        print(json.dumps([one.as_dict() for one in found]))
    else:
        Console().print(as_table(found))
        print("\n".join(line for one in found for line in as_lines(one)))
    raise typer.Exit(not all(one.fits for one in found))


@app.command("search-patterns")
@with_options
def search_patterns(
    model: ModelOptions,
    config: Annotated[RetrievalConfig, Fields("threads", "prefill_chunk", rest=False)],
    text: Annotated[Path, option("A text to try patterns on; best one like yours.", "--text")],
    out: Annotated[Path, option("The .json file to write, for --prefill.", "--out", "-o")],
    tokens: Annotated[str, option("Read so many of its tokens.", "--tokens")] = "16k",
    budget: Annotated[
        int | None, option("Keys read per query.", "--budget", default="5120, at most a quarter of the text")
    ] = None,
) -> None:
    """Find the pattern by which each head of a model prefills best, at a given cost.

    The model reads a text, and each head tries every pattern; that whose output is nearest to dense attention's wins.
    The file has the form in which MInference publishes its own. Ctrl-C leaves it as it was.
    """
    from retrieval_attn.attention.pattern_files import check_savable

    check_savable(out)
    n_tokens = parse_length(tokens, "--tokens", least=2048)
    read, notes = read_text(str(text)), Console(stderr=True)
    llm = load_model(notes, model, config)
    from retrieval_attn.terminal.patterns import as_table, search_with_bar

    found = search_with_bar(llm, llm.encode_text(read)[:n_tokens], budget, notes)
    found.save(out)
    Console().print(as_table(found))
    print(f"{found.n_tokens} tokens read, {found.budget} keys per query; the patterns are in {out}")


@app.command()
def options() -> None:
    """Print every option of retrieval and of answers, with what it does and its default, as Markdown."""
    from retrieval_attn.terminal.options_page import options_page

    print(options_page(), end="")


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script: runs a command and exits; what a person can mend is reported in one line."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Bytes and characters that a terminal's encoding lacks must not end a chat.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    let_threads_sleep()
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
