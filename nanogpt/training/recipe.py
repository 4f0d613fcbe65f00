"""Model and step size from a depth, as rules with few constants.

They go through the anchor below. Constants have their sources beside them; docs/PERFORMANCE.md has
the sweeps they were fitted to, with at most 4 layers and 7 M tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

HEAD_SIZE = 64  # channels, and of the model as many times as it has layers
# The anchor, 600 steps of stage=quickstart: layers, tokens, and tokens per optimizer step.
DEPTH, TOKENS, TOKENS_PER_STEP = 4, 1_228_800, 2048
TOKENS_PER_WEIGHT = 5.0  # fitted to depths 2 and 3; 20 in Hoffmann et al. (arXiv:2203.15556)
STEP_EXPONENT = 0.38  # of the tokens: Power Lines (arXiv:2505.13738) has 0.383
MAX_PASSES = 2  # over a corpus, after which a larger model gains more than a third (measured)


def tokens_of(depth: int) -> int:
    """Return the tokens of a run of this depth: TOKENS_PER_WEIGHT for each weight of the blocks."""
    return round(TOKENS_PER_WEIGHT * 12 * depth * (HEAD_SIZE * depth) ** 2)


def step_tokens(tokens: float, block_size: int) -> int:
    """Return the tokens of an optimizer step, a power of two rows: proportional to tokens**0.38."""
    rows = TOKENS_PER_STEP * (tokens / TOKENS) ** STEP_EXPONENT / block_size
    return int(block_size * 2 ** max(round(math.log2(rows)), 0))


def choices(config: Mapping[str, Any], depth: int, tokens: float) -> dict[str, Any]:
    """Return the values, by dotted key, of a run of this depth on about so many tokens.

    Keys that were typed are left out, and the steps where any budget was.
    """
    typed, per_step = config["typed"], config["tokens_per_step"]
    if "tokens_per_step" not in typed:
        per_step = step_tokens(tokens, config["model"]["block_size"])
    shape = {"n_layer": depth, "n_head": depth, "n_embd": HEAD_SIZE * depth}
    values: dict[str, Any] = {f"model.{key}": value for key, value in shape.items()}
    values |= {"tokens_per_step": per_step}
    if not {"max_steps", "max_tokens", "minutes"} & typed.keys():
        values |= {"max_steps": math.ceil(tokens / per_step), "max_tokens": None}
    return {key: value for key, value in values.items() if key not in typed}


def with_choices(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with values by dotted key, which it has under `chosen` too."""
    config = {**config, "chosen": {**config.get("chosen", {}), **chosen}}
    for key, value in chosen.items():
        group, _, name = key.partition(".")
        config[group] = {**config[group], name: value} if name else value
    return config
