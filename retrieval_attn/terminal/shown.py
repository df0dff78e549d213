"""What a person is shown: numbers, one line of statistics, an answer as it comes, one line for an error."""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrieval_attn import generate

# Failures that a person can do something about; everything else is a bug and keeps its traceback.
REPORTED = (ValueError, OSError, MemoryError, ImportError, RuntimeError)

# Control characters that a model may print, but a terminal must not obey; newline and tab stay.
HARMLESS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "�")


def one_line(error: BaseException) -> str:
    """An error's message on a single line."""
    return " ".join(str(error).split()) or type(error).__name__


def count(n: int) -> str:
    """131204 as "131 204"."""
    return f"{n:,}".replace(",", " ")


def size(n_bytes: float) -> str:
    """Bytes for people: "8 MB", "21.3 GB"."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


_ENDINGS = {"": "stopped", "length": "cut at max_new_tokens", "context": "the model's context is full"}


def stats_line(stats: "generate.GenerationStats") -> str:
    """One line about what an answer cost; see `GenerationStats`."""
    parts = [f"{count(stats.new_tokens)} tok"]
    if stats.tpot_s:
        parts.append(f"{1 / stats.tpot_s:.1f} tok/s")
    if stats.new_tokens:
        parts.append(f"TTFT {stats.ttft_s:.1f} s")
    parts.append(f"prompt {count(stats.prompt_tokens)} ({count(stats.reused_tokens)} cached)")
    if share := sparse_share(stats):
        parts.append(share)
    if stats.visited_fraction:
        parts.append(f"keys read {100 * stats.visited_fraction:.1f} %")
    if stats.recovered_mass is not None and stats.recovered_mass < 1:
        parts.append(f"attention found {100 * stats.recovered_mass:.1f} %")
    if stats.verified_error is not None:
        parts.append(f"verified error {100 * stats.verified_error:.1f} %")
    parts.append(f"near {size(stats.device_kv_bytes)}")
    parts.append(f"host {size(stats.host_kv_bytes + stats.marked_bytes + stats.index_bytes)}")
    if stats.stop_reason in _ENDINGS:
        parts.append(_ENDINGS[stats.stop_reason])
    return " · ".join(parts)


def sparse_share(stats: "generate.GenerationStats") -> str:
    """How much of the attention matrix a sparse prefill read; empty if it was exact or is not known."""
    if stats.prefill_read is None or stats.prefill_read == 1:
        return ""
    return f"prefill read {100 * stats.prefill_read:.0f} %"


def show_answer(write: Callable[[str], object], pieces: Generator[str, None, None], keep_blanks: bool = False) -> None:
    """Write the pieces of an answer as they come, and close the stream, also when interrupted.

    The first piece waits for the second: between the two, the bar of the index builds may be drawn. It loses its
    leading blanks, which chat templates ask for, unless they are kept.
    """
    held = ""
    with closing(pieces):
        try:
            for i, piece in enumerate(pieces):
                held += piece if i or keep_blanks else piece.lstrip()
                if i:
                    write(held)
                    held = ""
        finally:
            write(held)
