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
    "seed": ("a whole number of 64 bits",),
    "model.block_size": (COUNT,),
    "data.val_fraction": ("a number between 0 and 1",),
    "data.test_fraction": ("a number between 0 and 1",),
    "data.balance": (FLAG,),
    "data.max_examples": ("null", COUNT),
    "data.prompts": ("a list of texts",),
    "data.skip_bad": ("null", FLAG),
    "data.separator": ("null", TEXT),
    "data.path": ("null", TEXT),
    "data.pretokenized": ("null", TEXT),
    "data_dir": (TEXT,),
    "runs_dir": (TEXT,),
    "init_from": ("null", TEXT),
    "callbacks.hellaswag.path": ("null", TEXT),
    "max_steps": ("null", COUNT),
    "max_tokens": ("null", COUNT),
    "instruct.max_passes": ("null", COUNT),
    "tokens_per_step": (COUNT,),
    "micro_batch": ("auto", COUNT),
    "threads": ("auto", COUNT),
    "compile": ("auto", FLAG),
    "remeasure": (FLAG,),
    "resume": (FLAG,),
    "overwrite": (FLAG,),
    "debug": (FLAG,),
    "trainer.devices": ("auto", COUNT),
    "trainer.num_nodes": (COUNT,),
    "trainer.deterministic": (FLAG,),
    "trainer.detect_anomaly": (FLAG,),
    "trainer.precision": ("auto", "32-true", "bf16-mixed", "16-mixed"),
    "data.workers": ("0", COUNT),
    "data.tokens": ("null", COUNT),
    "data.shard_tokens": (COUNT,),
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
COUNTS_OF_TOKENS = {"max_steps", "max_tokens", "tokens_per_step", "tokens", "shard_tokens"}


def clear_other_budget(config: dict[str, Any], typed: Mapping[str, Any]) -> None:
    """Let a budget that was typed be the only one, whatever the preset's other says."""
    for key, other in (("max_steps", "max_tokens"), ("max_tokens", "max_steps")):
        if key in typed and other not in typed:
            config[other] = None


def make_whole(config: dict[str, Any]) -> None:
    """Turn counts that were typed as 10e9 into whole numbers."""
    for node in (config, config["data"]):
        for key in COUNTS_OF_TOKENS & node.keys():
            if isinstance(node[key], float) and node[key].is_integer():
                node[key] = int(node[key])


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
    if kind == "a whole number of 64 bits":
        return type(value) is int and -(2**63) <= value < 2**63
    if kind == NUMBER:
        return type(value) in (int, float) and 0 <= value < math.inf
    if kind == TEXT:
        return type(value) is str
    if kind == "a number between 0 and 1":
        return type(value) is float and 0 < value < 1
    if kind == "a list of texts":
        return type(value) is list and all(type(text) is str for text in value)
    return str(value) == kind.replace("null", "None")
