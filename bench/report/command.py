"""`retrieval-attn bench report`: all rows that are kept, as one page, and the README's measured tables from them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from retrieval_attn.bench.report.page import page
from retrieval_attn.bench.report.read import Found, read_folder
from retrieval_attn.bench.report.readme import BLOCKS, rewritten
from retrieval_attn.bench.shared.pictures import NO_PICTURES, can_draw
from retrieval_attn.bench.shared.report import check_writable, results_folder
from retrieval_attn.terminal.options import option


def command(
    results: Annotated[
        Path | None,
        option(
            "The folder of reports, *.json.",
            "--results",
            default="bench/results of the source tree, or the current folder",
        ),
    ] = None,
    out: Annotated[Path | None, option("Write the page to this .html file.", "--out", "-o")] = None,
    readme: Annotated[Path | None, option(f"Rewrite the blocks {', '.join(BLOCKS)} in it.", "--readme")] = None,
    check: Annotated[
        bool, option("Leave the README as it is; exit with 1 if its blocks are not what would be written.", "--check")
    ] = False,
) -> None:
    """Collect reports into one HTML page that needs nothing else, and into the tables of a README.

    A block of the README is what stands between <!-- bench report: NAME --> and <!-- end -->. A file that is no report
    is named and skipped. Pictures need matplotlib: the extra "plot".
    """
    _check(out, readme, check)
    found = read_folder(results or results_folder())
    for name, reason in found.skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    # What is wrong with the README is said before anything is written.
    before = readme.read_bytes() if readme is not None else b""
    after = _blocks(before, found, readme) if readme is not None else b""
    if out is not None:
        if not can_draw():
            print(NO_PICTURES, file=sys.stderr)
        out.write_bytes(page(found).encode("utf-8", "replace"))
    if before == after:
        return
    if check:
        print(f"{readme}: blocks are not up to date; run bench report --readme {readme}", file=sys.stderr)
        raise typer.Exit(1)
    assert readme is not None
    readme.write_bytes(after)


def _check(out: Path | None, readme: Path | None, check: bool) -> None:
    """Raise now, in one line, for what cannot be done."""
    if out is None and readme is None:
        raise ValueError("there is nothing to write; give --out FILE.html, --readme FILE, or both")
    if check and readme is None:
        raise ValueError("--check compares a README; name it with --readme FILE")
    if readme is not None:
        if not readme.is_file():
            raise ValueError(f"--readme must be a file that exists, got {str(readme)!r}")
        if not check:
            check_writable(readme, "--readme")
    if out is not None:
        if out.suffix.lower() != ".html":
            raise ValueError(f"--out must end in .html, got {str(out)!r}")
        check_writable(out, "--out")


def _blocks(text: bytes, found: Found, readme: Path) -> bytes:
    try:
        return rewritten(text.decode("utf-8"), found, readme.parent).encode("utf-8", "replace")
    except UnicodeDecodeError as error:
        raise ValueError(f"--readme must be UTF-8, got {str(readme)!r}: {error}") from error
