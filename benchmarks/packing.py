"""What packing conversations into rows gains over padding them: tokens of text trained per second.

    python benchmarks/packing.py --data instruction-data.json [--model nano] [--rounds 5]

Both train the same small GPT on the same conversations with the same optimizer, in passes that
alternate in one process, with about the same number of conversations per step. Packed rows hold
several conversations behind a document mask; padded rows hold one each, and reach to the longest of
their step or, as many programs have it, to the whole context. Only tokens of conversations count.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import random_models
import torch
from torch import Tensor

from nanogpt.data.instructions import Instructions, text_of
from nanogpt.data.packing import PackedRows
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import adamw
from nanogpt.prompts import find_template
from nanogpt.tokenizer import bpe_tokenizer
from nanogpt.training.language_model import next_token_loss
from nanogpt.training.machine import machine_id

VOCAB_SIZE = 2048
PACKED = "packed"


@dataclass(frozen=True)
class Step:
    """The conversations of one optimizer step; `n_tokens` of its places hold one."""

    input_ids: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    documents: Tensor | None  # (B, T)
    n_tokens: int


@dataclass(frozen=True)
class Rival:
    """One way to lay conversations out: the steps of a pass, and what trains a model on one."""

    steps: list[Step]
    train: Callable[[Step], None]

    @property
    def n_tokens(self) -> int:
        return sum(step.n_tokens for step in self.steps)

    @property
    def padding(self) -> float:
        """The share of all places that hold no conversation."""
        return 1 - self.n_tokens / sum(step.input_ids.numel() for step in self.steps)

    def tokens_per_s(self) -> float:
        """Train one pass over the conversations."""
        began = time.perf_counter()
        for step in self.steps:
            self.train(step)
        return self.n_tokens / (time.perf_counter() - began)


def main() -> int:
    """Time the rivals and print the table."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    config, packed, single = conversations(options)
    per_step = round(options.rows * len(single) / len(packed))  # conversations
    layouts = {
        PACKED: list(steps_of(packed, options.rows, trimmed=False, masked=True)),
        "padded to the longest": list(steps_of(single, per_step, trimmed=True, masked=False)),
        "padded to the context": list(steps_of(single, per_step, trimmed=False, masked=False)),
    }
    rivals = {name: Rival(steps, trainer(config)) for name, steps in layouts.items()}
    for rival in rivals.values():
        for step in rival.steps[:3]:  # warm
            rival.train(step)
    rounds = [
        {name: rival.tokens_per_s() for name, rival in rivals.items()}
        for _ in range(options.rounds)
    ]
    print(f"{options.model}, context {config.block_size}, {len(single):,} conversations")
    print(f"{machine_id(torch.device('cpu'))}, {options.threads} threads, fp32")
    for name, rival in rivals.items():
        speeds = [speed[name] for speed in rounds]
        ratios = [speed[PACKED] / speed[name] for speed in rounds]
        print(
            f"  {name:22} {statistics.median(speeds):8,.0f} tokens/s, "
            f"padding {100 * rival.padding:4.1f} %, packed is faster by "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return 0


def conversations(options: argparse.Namespace) -> tuple[GPTConfig, PackedRows, PackedRows]:
    """Return the model's shape and the file's conversations in its rows: packed, and one each."""
    read = Instructions(path=options.data).conversations
    template = find_template("chat")
    learnt = bpe_tokenizer(map(text_of, read), VOCAB_SIZE)
    tokenizer = learnt.with_special_tokens(template.special_tokens)
    shape = random_models.shape(parser(), options)
    block_size = options.block_size or shape.block_size
    config = replace(shape, vocab_size=tokenizer.vocab_size, block_size=block_size)
    encoded = (template.encode(tokenizer, one) for one in read)
    texts = [(ids, responses) for ids, responses in encoded if len(ids) <= block_size + 1]
    alone = [PackedRows.from_texts([text], config.block_size) for text in texts]
    single = PackedRows(
        *(np.concatenate([getattr(rows, f.name) for rows in alone]) for f in fields(PackedRows))
    )
    return config, PackedRows.from_texts(texts, config.block_size), single


def steps_of(rows: PackedRows, per_step: int, *, trimmed: bool, masked: bool) -> Iterator[Step]:
    """Yield the steps of a pass, of `per_step` rows each, in one shuffled order."""
    order = np.random.default_rng(0).permutation(len(rows))
    for start in range(0, len(order), per_step):
        chosen = order[start : start + per_step]
        filled = rows.lengths[chosen]
        end = filled.max() if trimmed else None
        input_ids, targets, documents, _ = (table[:, :end] for table in rows.batch(chosen).values())
        yield Step(input_ids, targets, documents if masked else None, int(filled.sum()))


def trainer(config: GPTConfig) -> Callable[[Step], None]:
    """Return what trains a model by one step."""
    torch.manual_seed(1)
    model = GPT(config)
    optimizer = adamw(model, learning_rate=1e-3)

    def train(step: Step) -> None:
        loss = next_token_loss(model, step.input_ids, step.targets, step.documents)
        (loss / (step.targets >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command = argparse.ArgumentParser(description="Time packed against padded conversations.")
    command.add_argument("--data", required=True, help="instructions, .jsonl or .json")
    random_models.add_options(command)
    command.set_defaults(model="nano")
    command.add_argument("--block-size", type=int, help="its context, tokens; default: the file's")
    command.add_argument("--rows", type=int, default=16, help="packed rows per step")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--threads", type=int, default=2)
    return command


if __name__ == "__main__":
    raise SystemExit(main())
