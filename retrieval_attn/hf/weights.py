"""Reads a model's weights, in the numbers that were asked for, and refuses a checkpoint that lacks any."""

import importlib.util
import logging
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from retrieval_attn.config import DTYPES, WEIGHTS
from retrieval_attn.hf.auto_class import auto_class
from retrieval_attn.hf.checkpoint import Checkpoint, first_line
from retrieval_attn.hf.versions import misshapen_weights


def load_weights(
    checkpoint: Checkpoint, model_config: Any, options: dict[str, Any], device: torch.device, attention: str
) -> Any:
    """A model with its weights, on a device, to be asked and not to be trained.

    model_config: as `read_config` gave it. options: of `weight_options`. attention: a name that transformers knows.
    Raises ValueError, in one line, for weights that cannot be read, and for a checkpoint without all of them.
    """
    try:
        with checkpoint.arguments(weights=True) as (source, named):
            model, report = auto_class(model_config).from_pretrained(
                source, config=model_config, attn_implementation=attention, output_loading_info=True,
                # Reported then, instead of raised in many lines.
                ignore_mismatched_sizes=True, **named, **options,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"the model at {checkpoint.source!r} cannot be loaded: {first_line(error)}") from error
    _refuse_incomplete(checkpoint.source, report)
    model.config.name_or_path = checkpoint.source
    if checkpoint.header is not None and hasattr(model.config, "quantization_config"):
        # By its config a saved session knows a model again, also when the file was moved.
        model.config.quantization_config.gguf_file = None
    return (model if "quantization_config" in options else model.to(device)).eval()


def _refuse_incomplete(source: str, report: dict[str, Any]) -> None:
    """Raise ValueError if weights are missing or of other shapes, for transformers draws them at random."""
    missing, misshapen = sorted(report["missing_keys"]), misshapen_weights(report)
    if missing:
        raise ValueError(
            f"the model at {source!r} lacks {len(missing)} of its weights, the first is {missing[0]}; download it again"
        )
    if misshapen:
        raise ValueError(
            f"the weights at {source!r} do not fit its config: {len(misshapen)} have other shapes than it says, the "
            f"first is {misshapen[0]}"
        )


def weight_options(
    checkpoint: Checkpoint, weights: str, dtype: str | torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What `load_weights` reads them as: the `weights` and the `dtype` of `load`, for transformers.

    Raises ValueError for other words and for what contradicts itself, ImportError for a missing extra.
    """
    check_weights(checkpoint, weights)
    name = asked_dtype(weights, dtype)
    if checkpoint.header is not None:
        return _gguf_options(weights, name, device)
    if weights in ("auto", "bf16"):
        return {"dtype": name}
    return {"dtype": name, **_bitsandbytes(weights, device)}


def check_weights(checkpoint: Checkpoint, weights: str) -> None:
    """Raise ValueError for another word than `load` knows, and for one that does not go with a GGUF file."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
    if checkpoint.header is not None and weights not in ("auto", "bf16"):
        raise ValueError(f"a GGUF file has its own numbers; weights must be 'auto' or 'bf16' for it, got {weights!r}")


def asked_dtype(weights: str, dtype: str | torch.dtype) -> str:
    """The name of the dtype that both together ask for, or "auto". Raises ValueError if they contradict each other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    if weights == "bf16" and name not in ("auto", "bfloat16"):
        raise ValueError(f"weights='bf16' and dtype={name!r} contradict each other; give one of them")
    return "bfloat16" if weights == "bf16" else name


def gguf_dtype(device: str) -> torch.dtype:
    """The dtype that a model from a GGUF file computes in, where nobody says: that in which the device is quick."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def _gguf_options(weights: str, dtype: str, device: torch.device) -> dict[str, Any]:
    from transformers import GgufConfig

    return {
        "dtype": gguf_dtype(device.type) if dtype == "auto" else getattr(torch, dtype),
        # Packed, weights need a kernel, and there is none for a CPU.
        "quantization_config": GgufConfig(dequantize=weights == "bf16" or device.type == "cpu"),
        "device_map": {"": device},
    }


def _bitsandbytes(weights: str, device: torch.device) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"weights={weights!r} needs bitsandbytes; pip install 'retrieval-attn[quant]'")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
    quantised = (
        BitsAndBytesConfig(load_in_8bit=True)
        if weights == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    )
    return {"quantization_config": quantised, "device_map": {"": device}}


def _is_no_cast(record: logging.LogRecord) -> bool:
    """False for a line that bitsandbytes logs in every layer at every token: that bfloat16 is cast to float16."""
    return "inputs will be cast from" not in str(record.msg)


def held_as(checkpoint: Checkpoint, model: Any) -> str:
    """Whether weights from a GGUF file are held packed or unpacked; empty for any other model."""
    if checkpoint.header is None:
        return ""
    packed = any(type(module).__module__.startswith("transformers.integrations.gguf") for module in model.modules())
    return "GGUF, packed" if packed else "GGUF, unpacked"
