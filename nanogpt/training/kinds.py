"""What kind of value a key of the configuration takes, where no object checks it when built."""

import math
from collections.abc import Mapping
from typing import Any

from nanogpt.runs.identity import flatten

COUNT = "a whole number of at least 1"
FLAG = "true or false"
NUMBER = "a number of at least 0"
TEXT = "a text"
KINDS = {
    "model.block_size": (COUNT,),
    "data.prompts": ("a list of texts",),
    "callbacks.hellaswag.path": ("null", TEXT),
    "instruct.max_passes": ("null", COUNT),
    "callbacks.log_every_n_steps": (COUNT,),
    "callbacks.validation.every_n_steps": (COUNT,),
    "callbacks.validation.tokens": ("null", COUNT),
    "callbacks.validation.final_tokens": ("null", COUNT),
    "callbacks.hellaswag.every_n_steps": ("null", COUNT),
    "callbacks.hellaswag.limit": ("null", COUNT),
    "callbacks.checkpoint.every_n_steps": (COUNT,),
    "callbacks.checkpoint.keep": ("0", COUNT),
    "callbacks.samples.every_n_steps": (COUNT,),
    "callbacks.samples.max_new_tokens": (COUNT,),
    "callbacks.samples.temperature": (NUMBER,),
    "callbacks.samples.top_k": ("null", COUNT),
    "callbacks.progress_every_s": (NUMBER,),
    "tokenizer.vocab_size": (COUNT,),
}


def check_kinds(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a value of the wrong kind; objects check their own when built."""
    flat = flatten(config)
    for key, kinds in KINDS.items():
        if key not in flat and key.startswith(("data.", "instruct.", "tokenizer.")):
            continue  # not all data sets, stages and tokenizers have all keys
        if kinds[-1] == TEXT and flat[key] == "":
            raise ValueError(
                f"{key} is empty (an unset variable of the shell?); give it a value or omit it"
            )
        if not any(_is_kind(flat[key], kind) for kind in kinds):
            raise ValueError(f"{key}={flat[key]!r} is not {' or '.join(kinds)}")


def _is_kind(value: Any, kind: str) -> bool:
    if kind == COUNT:
        return type(value) is int and value >= 1
    if kind == FLAG:
        return type(value) is bool
    if kind == NUMBER:
        return type(value) in (int, float) and 0 <= value < math.inf
    if kind == TEXT:
        return type(value) is str
    if kind == "a number between 0 and 1":
        return type(value) is float and 0 < value < 1
    if kind == "a list of texts":
        return type(value) is list and all(type(text) is str for text in value)
    return str(value) == kind.replace("null", "None")
