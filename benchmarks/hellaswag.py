"""HellaSwag items per second, against the way that build-nanogpt scores them.

    python benchmarks/hellaswag.py --data FILE.jsonl [--items 24] [--rounds 5] [--threads 2]

Both score the same items, of build-nanogpt's style, with the same random GPT-2 of 124M parameters
in fp32: theirs as its hellaswag.py does (one item at a time, context and ending in four whole rows
that are padded to the longest, logits at all of their tokens); ours what endings share once, logits
at the endings alone, several items of like length at a time. The model's code is the same. Rounds
alternate; the median of the rounds' ratios and their range is what counts. Every difference of the
log-likelihoods is shown too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.evaluation.examples import read_items
from nanogpt.evaluation.hellaswag import Item, completion_request
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, loglikelihoods
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import gpt2_tokenizer

Sums = list[list[float]]


def main() -> int:
    """Measure, and print a table in Markdown."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = GPT(GPTConfig.preset(options.preset)).to(device).eval()
    tokenizer = gpt2_tokenizer()
    items = read_items(Item, options.data, options.items)
    requests = [completion_request(tokenizer, item) for item in items]
    ours, theirs, difference = measure(model, requests, options.rounds, options.batch_size)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{options.preset}, {len(items)} items, {options.rounds} rounds, {device}, fp32\n")
    print("| | items/s, median (min to max) |\n|---|---|")
    for name, rates in (("four rows per item", theirs), ("ours", ours), ("ratio", ratios)):
        print(f"| {name} | {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}) |")
    print(f"\nlargest difference of a log-likelihood: {difference:.1e} nats")
    if options.json is not None:
        found = {"ours": ours, "theirs": theirs, "ratios": ratios, "difference": difference}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def measure(
    model: GPT, requests: Sequence[Request], rounds: int, batch_size: int
) -> tuple[list[float], list[float], float]:
    """Return items per second of both ways by round, and the largest difference of their sums."""

    def shared() -> Sums:
        return [[a.loglikelihood for a in of] for of in loglikelihoods(model, requests, batch_size)]

    def four_rows() -> Sums:
        return [four_rows_of(model, request).tolist() for request in requests]

    pairs = zip(shared(), four_rows(), strict=True)  # warms up
    difference = max(abs(a - b) for found in pairs for a, b in zip(*found, strict=True))
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(len(requests) / seconds(shared))
        theirs.append(len(requests) / seconds(four_rows))
    return ours, theirs, difference


def seconds(run: Callable[[], Sums]) -> float:
    """Return how long a way takes; its sums are plain numbers, so that a GPU is done with them."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def four_rows_of(model: GPT, request: Request) -> Tensor:
    """Return the endings' log-likelihoods (4,), from logits at every token of four whole rows."""
    rows = [[*request.context, *ending] for ending in request.continuations]
    n_tokens = max(map(len, rows))
    ids = torch.zeros(len(rows), n_tokens, dtype=torch.int64)
    is_ending = torch.zeros(len(rows), n_tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        is_ending[i, len(request.context) : len(row)] = True
    device = model.wte.weight.device
    ids, is_ending = ids.to(device), is_ending.to(device)
    logits = model(ids)[:, :-1].contiguous()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -losses.view(len(rows), -1).where(is_ending[:, 1:], 0).sum(1)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="HellaSwag's .jsonl file")
    parser.add_argument("--items", type=int, default=24, help="the first so many (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="gpt2", help="the shape (%(default)s)")
    parser.add_argument("--json", type=Path, help="a file for the results")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
