"""Log-likelihoods of texts after others: the one scorer behind every task.

A request is a context and continuations of it, in tokens. Its row is a tree: the context stands in
it once, and each token attends to those on its path to the root. Rows are padded; logits are
computed for scored tokens alone. Where a model's blocks mix tokens outside `attend`, each
continuation is a row of its own.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary, S scored positions,
N scored tokens.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nanogpt.model import GPT, Attend, Block, run_block
from nanogpt.ranks import gathered
from nanogpt.support import IN_MODEL, check_supported, mixes_by_attend
from nanogpt.tokenizer import Tokenizer

BATCH_SIZE = 8  # requests per forward
ROW_MULTIPLE = 32  # tokens; a matrix product adds the remainder of it in another order
TREE_TOKENS = 1024  # largest row: its attention scores grow with their square
LOGITS_ROWS = 128  # of V logits, computed at a time
PROGRESS_S = 10.0  # between updates of the bar


Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Request:
    """A context of at least one token, and continuations of it."""

    context: Tokens
    continuations: Sequence[Tokens]


@dataclass(frozen=True)
class Result:
    """The log-likelihood of a continuation in nats, and whether greedy decoding would write it."""

    loglikelihood: float
    is_greedy: bool


@torch.inference_mode()
def loglikelihoods(
    model: GPT, requests: Sequence[Request], batch_size: int = BATCH_SIZE
) -> list[list[Result]]:
    """Return a result for every continuation of every request.

    Where a context and a continuation together exceed the model's context, the beginning of the
    context is dropped; a longer continuation is scored in parts of half the model's context, each
    after as much as fits of the text before it. Neither the order of the requests nor the size of
    the batches changes the results. Of several ranks each computes a share and returns all results.

    Raises ValueError where the model gives no finite likelihoods, or is not supported.
    """
    assert not model.training, "dropout would change the results"
    check_supported(model.config, "the scorer (nanogpt/evaluation/scoring.py)", IN_MODEL)
    rank, n_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tree_tokens, multiple = (TREE_TOKENS, ROW_MULTIPLE) if mixes_by_attend(model) else (0, 1)
    own = requests[rank::n_ranks]
    results = [[Result(0.0, True)] * len(request.continuations) for request in own]
    rows = [
        row
        for i, request in enumerate(own)
        for row in _rows(i, request, model.config.block_size, tree_tokens)
    ]
    batches = list(_batches(rows, batch_size, multiple))
    shown: dict[str, Any] = {"delay": PROGRESS_S, "mininterval": PROGRESS_S, "disable": rank > 0}
    for n_padded, batch in tqdm(batches, "scoring", **shown):
        owners = [(results[row.request], index) for row in batch for index in row.continuations]
        for (found, index), new in zip(owners, _results(model, batch, n_padded), strict=True):
            loglikelihood = found[index].loglikelihood + new.loglikelihood
            found[index] = Result(loglikelihood, found[index].is_greedy and new.is_greedy)
    shares = gathered(results)
    return [shares[i % n_ranks][i // n_ranks] for i in range(len(requests))]


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of what follows it, as lm-evaluation-harness cuts them.

    White space at the end of the context goes over to the continuation. Both are encoded as one
    text, and what exceeds the context's own ids is the continuation's. An empty context begins a
    document.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    ids = tokenizer.encode_prompt(stripped)
    if not stripped:
        return ids, tokenizer.encode(continuation)
    whole = tokenizer.encode_prompt(stripped + continuation)
    return ids, whole[len(ids) :] or whole[-1:]


@dataclass(frozen=True)
class _Row:
    """Part of a request that fits the model: a context, and some continuations by their index."""

    request: int
    context: Tokens
    continuations: dict[int, Tokens]

    @property
    def n_tokens(self) -> int:
        """The number of tokens of its tree."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations.values())

    def tree(self, n_padded: int) -> tuple[list[int], list[int], list[int], np.ndarray | None]:
        """Return the tokens, the id before each, the index before each target, and the mask.

        The mask (T, T) bool shows which tokens each attends to; padding attends to itself. It is
        None for one continuation: such a row is causal.
        """
        n, ids = len(self.context), list(map(int, self.context))
        ids_before = [0, *ids[:-1]]
        before: list[int] = []
        mask = np.eye(n_padded, dtype=bool)
        mask[:n, :n] = np.tri(n, dtype=bool)
        for continuation in self.continuations.values():
            start, end = len(ids), len(ids) + len(continuation) - 1
            mask[start:end, :n] = True
            mask[start:end, start:end] = np.tri(end - start, dtype=bool)
            ids += map(int, continuation[:-1])
            ids_before += [ids[n - 1], *ids[start:end]][:-1]
            before += [n - 1, *range(start, end)]
        return ids, ids_before, before, mask if len(self.continuations) > 1 else None


def _rows(number: int, request: Request, block_size: int, tree_tokens: int) -> Iterator[_Row]:
    """Yield continuations that fit together with their context, else each apart or in parts."""
    context = request.context
    assert len(context), "the context is empty"
    assert all(map(len, request.continuations)), "a continuation is empty"
    together: dict[int, Tokens] = {}
    n_tokens = len(context)
    for index, continuation in enumerate(request.continuations):
        n_new = len(continuation) - 1  # the last token is a target only
        if len(context) + n_new > block_size:
            text = [*context, *continuation]
            step = len(continuation) if n_new < block_size else max(block_size // 2, 1)
            for start in range(len(context), len(text), step):
                scored = text[start : start + step]
                before = text[max(start + len(scored) - 1 - block_size, 0) : start]
                yield _Row(number, before, {index: scored})
            continue
        if together and n_tokens + n_new > tree_tokens:
            yield _Row(number, context, together)
            together, n_tokens = {}, len(context)
        together[index] = continuation
        n_tokens += n_new
    if together:
        yield _Row(number, context, together)


def _batches(
    rows: Sequence[_Row], batch_size: int, multiple: int
) -> Iterator[tuple[int, list[_Row]]]:
    """Yield a padded length and its rows, the longest first, trees apart from chains.

    So the computation of a row does not depend on the others, nor, on a CPU, do its bits.
    """
    alike: dict[tuple[int, bool], list[_Row]] = defaultdict(list)
    for row in rows:
        n_padded = -(-row.n_tokens // multiple) * multiple
        alike[n_padded, len(row.continuations) == 1].append(row)
    for (n_padded, _), group in sorted(alike.items(), key=lambda item: item[0], reverse=True):
        for start in range(0, len(group), batch_size):
            yield n_padded, group[start : start + batch_size]


def _results(model: GPT, rows: Sequence[_Row], n_padded: int) -> Iterator[Result]:
    """Yield the results of all continuations of rows that are padded to one length."""
    device, trees = model.wte.weight.device, [row.tree(n_padded) for row in rows]
    padded = torch.zeros(2, len(rows), n_padded, dtype=torch.int64)
    for i, (own, own_before, *_) in enumerate(trees):
        padded[:, i, : len(own)] = torch.tensor([own, own_before])
    ids, ids_before = padded.to(device)  # (B, T) each
    mask, positions = None, torch.arange(n_padded).clamp(max=model.config.block_size - 1)  # (T,)
    if masks := [mask for *_, mask in trees if mask is not None]:
        mask = torch.from_numpy(np.stack(masks))  # (B, T, T)
        positions = mask.sum(-1) - 1  # (B, T)
        mask = mask[:, None].to(device)
    before = [i * n_padded + index for i, (*_, own, _) in enumerate(trees) for index in own]
    scored, of_target = torch.tensor(before).unique(return_inverse=True)  # (S,), (N,)
    scored = F.pad(scored, (0, -len(scored) % ROW_MULTIPLE)).to(device)
    positions, attend = positions.to(device), Attend(mask)
    x = model.embed(ids, positions, ids_before)  # (B, T, C)
    last = model.h[-1]

    def last_block(x: Tensor, rotation: Tensor | None, attend: Attend) -> Tensor:
        if type(last) is not Block:
            return last(x, rotation, attend).flatten(0, 1)[scored]
        # beyond attention it computes scored tokens alone: 6 % less for GPT-2 small
        x = (x + last.attn(last.ln_1(x), rotation, attend)).flatten(0, 1)[scored]
        return x + last.mlp(last.ln_2(x))

    def run(block: nn.Module, *inputs: Any) -> Tensor:
        return run_block(last_block if block is last else block, *inputs)

    states = model.run_blocks(x, model.rotation(positions), attend, run)  # (S, C)
    continuations = [tokens for row in rows for tokens in row.continuations.values()]
    targets = torch.tensor([int(token) for tokens in continuations for token in tokens])  # (N,)
    loglikelihoods, hits = _score(model, states, of_target, targets)
    sizes = list(map(len, continuations))
    for part, hit in zip(loglikelihoods.split(sizes), hits.split(sizes), strict=True):
        if not part.isfinite().all():
            raise ValueError(
                "the model gives no finite likelihoods: its weights are damaged, or its training "
                "diverged; pass another checkpoint"
            )
        yield Result(float(part.sum()), bool(hit.all()))


def _score(model: GPT, states: Tensor, of_target: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability (N,) float64, and whether it is the likeliest (N,).

    `of_target` (N,) is the index in states (S, C) that predicts each target (N,).
    """
    found = torch.empty(len(targets), dtype=torch.float64)
    hits = torch.empty(len(targets), dtype=torch.bool)
    for start in range(0, len(states), LOGITS_ROWS):
        logits = model.head(states[start : start + LOGITS_ROWS]).float()  # (<= LOGITS_ROWS, V)
        own = (of_target // LOGITS_ROWS == start // LOGITS_ROWS).nonzero().flatten()
        rows, ids = (of_target[own] - start).to(logits.device), targets[own].to(logits.device)
        found[own] = (logits[rows, ids] - logits.logsumexp(-1)[rows]).cpu().double()
        hits[own] = (logits.argmax(-1)[rows] == ids).cpu()
    return found, hits
