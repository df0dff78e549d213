"""Which of transformers' auto classes makes a model: a language model, or one that sees images, for its text side.

Of the second kind all is loaded, the part that sees, too: it is small beside the text model, and without it the
check that no weight is missing would have to know which ones belong to it. Text never runs it.
"""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)


def auto_class(model_config: Any) -> Any:
    """The auto class for models with this config, the one for language models first; None if there is none."""
    return next((auto for auto in _AUTO_CLASSES if type(model_config) in auto._model_mapping), None)


def model_class(model_config: Any) -> Any:
    """The class that it makes; None if there is none."""
    auto = auto_class(model_config)
    made = None if auto is None else auto._model_mapping[type(model_config)]
    return made[0] if isinstance(made, tuple) else made
