"""What a model is loaded from, a folder, a hub id or a GGUF file: what is wrong is said before weights are read.

`find_checkpoint` looks at names and first bytes, `read_config` at the model's config; `weights.py` reads the rest.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from retrieval_attn.hf.auto_class import auto_class
from retrieval_attn.hf.chat_template import stored_template
from retrieval_attn.hf.gguf_header import MAGIC, GgufHeader, read_header
from retrieval_attn.hf.gguf_parts import join, of_one_model, whole_header
from retrieval_attn.hf.gguf_rope import with_scaled_positions
from retrieval_attn.hf.positions import scaled_positions
from retrieval_attn.hf.served import refuse_unserved
from retrieval_attn.hf.versions import READS_GGUF

_POINTER = b"version https://git-lfs"

# Of each group, the first pattern that fits any file tells what is read.
_READ = (
    ("config.json",),
    ("model*.safetensors", "pytorch_model*.bin"),
    ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.*"),
    ("tokenizer_config.json",),
    ("chat_template.json",),
)

# Fields of a GGUF file that change what a model computes, and what a config calls them.
_MUST_AGREE = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies.

    source: a folder or hub id, as transformers takes it; the path of a GGUF file, or of the first of its parts.
    header: of a GGUF file, else None.
    """

    source: str
    header: GgufHeader | None = None

    @contextmanager
    def arguments(self, weights: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """What `from_pretrained` is called with. weights: whether it reads them, too.

        A GGUF file is named from within an empty folder: of what lies beside it, as other tokenizers, nothing is read.
        Parts are joined in that folder, as transformers reads whole files alone.
        """
        if self.header is None:
            yield self.source, {}
            return
        in_parts = self.header.fields.get("split.count", 1) > 1
        # Beside the parts there is room for as many bytes rather than where temporary files lie, often in memory.
        beside = self.header.path.parent if in_parts and os.access(self.header.path.parent, os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=beside) as folder:
            if in_parts:
                join(self.header, Path(folder) / "whole.gguf", weights)
            yield folder, {"gguf_file": "whole.gguf" if in_parts else self.source}


def find_checkpoint(model: str | Path) -> Checkpoint:
    """What `load` was given, as a checkpoint.

    Raises FileNotFoundError for a missing path; ValueError, in one line, for a Git LFS pointer in the place of a file
    that is read, for a folder with several GGUF files, and for a GGUF file that cannot be read; ImportError with the
    install command where GGUF files need a package.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _of_gguf(path)
    if path.is_dir():
        return _of_folder(path)
    source = str(model)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1 or path.suffix == ".gguf":
        raise FileNotFoundError(
            f"no model at {source!r}; give a folder with config.json and weights, a GGUF file, a hub id like "
            "'org/name', or nothing for the embedded model"
        )
    return Checkpoint(source)


def _of_folder(folder: Path) -> Checkpoint:
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").exists():
        if len(files) > 1 and not of_one_model(files):
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{folder} holds {len(files)} GGUF files ({names}); name the one to load")
        return _of_gguf(files[0])
    for group in _READ:
        found = (sorted(folder.glob(pattern)) for pattern in group)
        for file in next(filter(None, found), []):
            _refuse_pointer(file)
    return Checkpoint(str(folder))


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download it"
            )


def _of_gguf(path: Path) -> Checkpoint:
    _refuse_pointer(path)
    with path.open("rb") as file:
        if path.suffix != ".gguf" and file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is a file, but no GGUF file; give the folder with config.json and weights")
    if not READS_GGUF:
        raise ValueError(
            f"transformers {transformers.__version__} cuts the text for GGUF files into other tokens than their "
            "models know; they need 5.18 or newer: pip install -U transformers"
        )
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f"a GGUF file needs {' and '.join(absent)}; pip install {' '.join(absent)}")
    header = read_header(path.absolute())
    if header.fields.get("split.count", 1) > 1:
        header = whole_header(header)
    _refuse_what_is_no_model(header)
    return Checkpoint(str(header.path), header)


def _refuse_what_is_no_model(header: GgufHeader) -> None:
    kind = header.fields.get("general.type", "model")
    if kind != "model":
        what = "a LoRA adapter" if kind == "adapter" else f"no model but {kind!r}"
        raise ValueError(f"{header.path} holds {what}; give the GGUF file of the model itself")


def read_config(checkpoint: Checkpoint, rope: str | None = None) -> Any:
    """The config of a model that can be served; no weights are read. rope: see `scaled_positions`; None leaves it.

    Raises ValueError, in one line, for anything else.
    """
    try:
        with checkpoint.arguments() as (source, options):
            found = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(f"the model at {checkpoint.source!r} cannot be loaded: {first_line(error)}") from error
    refuse_unserved(found)
    if auto_class(found) is None:
        raise ValueError(f"{found.model_type!r} is not a causal language model, nor one that sees images, too")
    if checkpoint.header is not None:
        _refuse_what_was_dropped(checkpoint.source, checkpoint.header, found.get_text_config(decoder=True))
        found = with_scaled_positions(found, checkpoint.header)
    return found if rope is None else scaled_positions(found, rope)


def _refuse_what_was_dropped(source: str, header: GgufHeader, text: Any) -> None:
    """Raise ValueError if the file says of the model what transformers did not take over: its text would be wrong."""
    for field, name in _MUST_AGREE.items():
        said, taken = header.of_model(field), getattr(text, name, None)
        if said and taken != said:
            raise ValueError(f"{source!r} says {field}={said}, but transformers reads {name}={taken} from it")


def load_tokenizer(checkpoint: Checkpoint, config: Any) -> Any:
    """The checkpoint's tokenizer; of a GGUF file, made from its vocabulary and with its chat template.

    config: the model's. Raises ValueError, in one line, if there is no tokenizer, or if it has more tokens than the
    model knows.
    """
    tokenizer = _read_tokenizer(checkpoint)
    known = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    # A model may know more than its tokenizer has: embeddings are padded. Tokens added by hand may be beyond its end.
    if known is not None and tokenizer.vocab_size > known:
        raise ValueError(
            f"the tokenizer at {checkpoint.source!r} has {tokenizer.vocab_size} tokens and the model knows {known}; "
            "take the tokenizer that the model was trained with"
        )
    return tokenizer


def _read_tokenizer(checkpoint: Checkpoint) -> Any:
    # For a GGUF file the automatic choice would read all of the vocabulary once more, only to learn the model's type.
    kind = AutoTokenizer if checkpoint.header is None else PreTrainedTokenizerFast
    try:
        with checkpoint.arguments() as (source, options):
            tokenizer = kind.from_pretrained(source, **options)
            if checkpoint.header is None and not tokenizer.chat_template:
                tokenizer.chat_template = stored_template(source)
            return tokenizer
    except (OSError, ValueError, LookupError, ImportError) as error:
        # ImportError: transformers 4.57 asks for protobuf where there is no tokenizer at all.
        reason = first_line(error).rstrip(":")
        raise ValueError(f"the tokenizer at {checkpoint.source!r} cannot be loaded: {reason}") from error


def first_line(error: Exception) -> str:
    """What an error says first."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
