"""Random models for the other benchmarks: checkpoints of a published shape or of a conf/model file.

    python benchmarks/random_models.py OUT.ckpt --model qwen3_small --set n_layer=2 n_embd=128

The vocabulary has the published size, that of GPT-2 where there is none. `--noise` is the standard
deviation of what is added to every tensor, norms and biases too.
"""

import argparse
import itertools
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from nanogpt.checkpoint import KEY, record, write_checkpoint
from nanogpt.model import GPT, PRESETS, GPTConfig
from nanogpt.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
)
from nanogpt.values import explain

CONF = Path(__file__).parent.parent / "conf" / "model"
VOCABULARIES = {"smollm2_135m": 49152, "qwen3_0_6b": 151936}  # as published
FIELDS = [field.name for field in fields(GPTConfig)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    add_options(parser)
    parser.add_argument("--noise", type=float, default=0.0)
    options = parser.parse_args()
    config = shape(parser, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model = write_random(options.out, config, options.noise)
    print(f"{options.out}: {model.num_parameters():,} parameters")
    return 0


def add_options(parser: argparse.ArgumentParser, name: str = "--model") -> None:
    """Add the options that choose a shape."""
    shapes = [*PRESETS, *sorted(path.stem for path in CONF.glob("*.yaml"))]
    parser.add_argument(name, dest="model", default="gpt2_small", choices=shapes)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="fields of GPTConfig to change"
    )


def shape(parser: argparse.ArgumentParser, options: argparse.Namespace) -> GPTConfig:
    """Return the shape that the options choose; exit with 2 where no model has it."""
    values: dict[str, Any] = {}
    if options.model in PRESETS:
        values |= vars(GPTConfig.preset(options.model))
    else:
        for file in ("gpt2_small", options.model):  # from whose values the others begin
            values |= yaml.safe_load((CONF / f"{file}.yaml").read_text())
        values["vocab_size"] = VOCABULARIES.get(options.model, GPTConfig.vocab_size)
    values |= {
        key: yaml.safe_load(value)
        for key, _, value in (pair.partition("=") for pair in options.set)
    }
    try:
        return GPTConfig(**{k: v for k, v in values.items() if k not in ("_target_", "defaults")})
    except ValidationError as error:
        parser.error(explain(error, "--set"))


def write_random(path: Path, config: GPTConfig, noise: float = 0.0) -> GPT:
    """Write a checkpoint of random weights; return the model."""
    torch.manual_seed(0)
    model = GPT(config)
    if noise:
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=noise)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    about = record("pretrain", config, tokenizer_of(config.vocab_size))
    write_checkpoint({"state_dict": weights, "global_step": 0, KEY: about}, path)
    return model.eval()


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """Return GPT-2's tokenizer, cut or filled up with pairs and triples of bytes.

    All pairs are tokens before the first triple, so that merges lead to each of them. Where GPT-2's
    tokens cannot be had, bytes are filled up.
    """
    known = byte_tokenizer()
    with suppress(FileNotFoundError):
        known = gpt2_tokenizer()
    if vocab_size == known.vocab_size:
        return known
    tokens = dict.fromkeys(token for token in known.token_bytes() if token)
    more = (bytes(t) for n in (2, 3) for t in itertools.product(range(256), repeat=n))
    while len(tokens) < vocab_size - 1:
        tokens[next(more)] = None
    return Tokenizer("bpe", GPT2_PATTERN, [*tokens][: vocab_size - 1], [END_OF_TEXT])


if __name__ == "__main__":
    sys.exit(main())
