"""How likely a model finds texts after others: the one scorer behind every task.

A question is a context and continuations of it, in tokens. Its row is the context once and then all
continuations, each of which sees the context and itself alone: the context is not computed again
for every one of them. Logits are computed where a token is scored and nowhere else.

Shapes: B batch, T time, C channels, V vocabulary, N scored tokens.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanogpt.model import GPT, rotary_angles
from nanogpt.tokenizer import Tokenizer

BATCH_SIZE = 8  # questions of a forward
PRODUCT_ROWS = (
    32  # tokens in a matrix product: what is left of a multiple is added in another order
)
ROW_MULTIPLE = 16  # tokens of a row; two make the products whole
LOGITS_ROWS = 128  # of V logits, held at a time
PROGRESS_S = 10.0  # between lines of the log

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A context of at least one token, and what may follow it."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Answer:
    """The log-likelihood of a continuation in nats, and whether it is what the model would say."""

    log_likelihood: float
    is_greedy: bool


@torch.inference_mode()
def answer(
    model: GPT, questions: Sequence[Question], batch_size: int = BATCH_SIZE
) -> list[list[Answer]]:
    """Return an answer for every continuation of every question.

    Where a context and a continuation are longer than the model's context together, the beginning
    of the context is not read; a continuation that is longer itself is scored to its end in pieces
    of half the model's context, each after as much as fits of what precedes it. The order of the
    questions and the size of the batches do not change the answers.
    """
    assert not model.training, "dropout would change the answers"
    pieces = [piece for i, q in enumerate(questions) for piece in _pieces(i, q, model)]
    answers = [[Answer(0.0, True)] * len(q.continuations) for q in questions]
    n_done, told = 0, time.monotonic()
    for batch in _batches(pieces, batch_size):
        for piece, found in zip(batch, _answer_batch(model, batch), strict=True):
            for place, new in zip(piece.places, found, strict=True):
                before = answers[piece.question][place]
                answers[piece.question][place] = Answer(
                    before.log_likelihood + new.log_likelihood, before.is_greedy and new.is_greedy
                )
        n_done += len(batch)
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            log.info("scored %s of %s", f"{n_done:,}", f"{len(pieces):,}")
    return answers


def answer_on_all_ranks(
    model: GPT, questions: Sequence[Question], batch_size: int = BATCH_SIZE
) -> list[list[Answer]]:
    """Return what `answer` does on every rank, each of which has answered its share."""
    if not (dist.is_available() and dist.is_initialized()):
        return answer(model, questions, batch_size)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    shares: list[Any] = [None] * n_ranks
    dist.all_gather_object(shares, answer(model, questions[rank::n_ranks], batch_size))
    return [shares[i % n_ranks][i // n_ranks] for i in range(len(questions))]


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of what follows it, as lm-evaluation-harness cuts them.

    White space at the end of the context goes over to the continuation. Both are encoded as one
    text, and what exceeds the context's own ids is the continuation's. The end of text stands for
    an empty context.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    ids = tokenizer.encode(stripped)
    whole = tokenizer.encode(stripped + continuation)
    return ids or [tokenizer.eot_id], whole[len(ids) :] or whole[-1:]


@dataclass(frozen=True)
class _Piece:
    """Part of a question that fits the model: continuations, and their places in the question."""

    question: int
    context: Sequence[int]
    continuations: Sequence[Sequence[int]]
    places: Sequence[int]

    @property
    def n_tokens(self) -> int:
        """The tokens of its row: nothing follows the last token of a continuation."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


def _pieces(number: int, question: Question, model: GPT) -> Iterator[_Piece]:
    """Yield a question whole where it fits, else every continuation apart."""
    context, continuations = question.context, question.continuations
    assert context, "there is nothing to begin from"
    assert all(continuations), "there is nothing to score"
    block_size = model.config.block_size
    if len(context) + max(map(len, continuations)) - 1 <= block_size:
        yield _Piece(number, context, continuations, range(len(continuations)))
        return
    for place, continuation in enumerate(continuations):
        text = [*context, *continuation]
        step = len(continuation) if len(continuation) <= block_size else max(block_size // 2, 1)
        for start in range(len(context), len(text), step):
            scored = text[start : start + step]
            before = text[max(start + len(scored) - 1 - block_size, 0) : start]
            yield _Piece(number, before, [scored], [place])


def _batches(pieces: Sequence[_Piece], batch_size: int) -> Iterator[list[_Piece]]:
    """Yield pieces of one padded length together, the longest first.

    So a row's shape does not depend on its company, nor do, on a CPU, the bits of its answer.
    """
    alike: dict[tuple[int, bool], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        alike[_padded(piece.n_tokens), len(piece.continuations) > 1].append(piece)
    for _, group in sorted(alike.items(), key=lambda item: item[0], reverse=True):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _padded(n_tokens: int) -> int:
    return -(-n_tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def _answer_batch(model: GPT, batch: Sequence[_Piece]) -> list[list[Answer]]:
    rows = [_Row(piece) for piece in batch]
    device = model.wte.weight.device
    n_tokens = _padded(batch[0].n_tokens)
    empty: list[list[int]] = [[]] * (len(rows) * n_tokens % PRODUCT_ROWS > 0)

    def tensor(of_rows: list[list[int]], filling: int) -> Tensor:
        whole = [[*row, *[filling] * (n_tokens - len(row))] for row in of_rows + empty]
        return torch.tensor(whole, device=device)

    input_ids = tensor([row.input_ids for row in rows], 0)  # (B, T)
    if len(batch[0].continuations) == 1:
        states = model.hidden_states(input_ids[:, : model.config.block_size])
    else:
        positions = tensor([row.positions for row in rows], 0)
        branches = tensor([row.branches for row in rows], -1)
        states = branched_states(model, input_ids, positions, branches)
    row_of = torch.tensor([i for i, row in enumerate(rows) for _ in row.targets], device=device)
    scored = torch.tensor([place for row in rows for place in row.scored], device=device)
    targets = torch.tensor([token for row in rows for token in row.targets], device=device)
    log_likelihoods, hits = _score(model, states[row_of, scored], targets)
    sizes = [len(c) for piece in batch for c in piece.continuations]
    found = iter(
        Answer(float(part.sum()), bool(hit.all()))
        for part, hit in zip(log_likelihoods.split(sizes), hits.split(sizes), strict=True)
    )
    return [[next(found) for _ in piece.continuations] for piece in batch]


class _Row:
    """A piece as a row: tokens, their positions and branches, and where which token is scored."""

    def __init__(self, piece: _Piece) -> None:
        n = len(piece.context)
        self.input_ids = list(piece.context)
        self.positions = list(range(n))
        self.branches = [0] * n  # the context's
        self.scored: list[int] = []
        self.targets: list[int] = []
        for branch, continuation in enumerate(piece.continuations, start=1):
            start = len(self.input_ids)
            self.scored += [n - 1, *range(start, start + len(continuation) - 1)]
            self.targets += continuation
            self.input_ids += continuation[:-1]
            self.positions += range(n, n + len(continuation) - 1)
            self.branches += [branch] * (len(continuation) - 1)


def branched_states(model: GPT, input_ids: Tensor, positions: Tensor, branches: Tensor) -> Tensor:
    """Return the final states (B, T, C) of rows whose branches do not see each other.

    `branches` (B, T) are 0 for the context that all of a row's branches continue.
    """
    keys, queries = branches[:, None, None, :], branches[:, None, :, None]
    mask = ((keys == queries) | (keys == 0)).tril()  # (B, 1, T, T)
    x, rotation = model.wte(input_ids), None
    if model.config.position == "learned":
        x = x + model.wpe(positions)
    else:
        rotation = rotary_angles(positions, model.config.n_embd // model.config.n_head)
    for block in model.h:
        x = block(x, rotation, None, mask)
    return model.ln_f(x)


def _score(model: GPT, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability (N,) float64, and whether none is likelier (N,)."""
    found, hits = [], []
    n_scored, n_padding = len(targets), -len(targets) % PRODUCT_ROWS
    states, targets = F.pad(states, (0, 0, 0, n_padding)), F.pad(targets, (0, n_padding))
    for part, wanted in zip(states.split(LOGITS_ROWS), targets.split(LOGITS_ROWS), strict=True):
        logits = model.head(part).float()  # (<= LOGITS_ROWS, V)
        found.append(-F.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
    return torch.cat(found).cpu().double()[:n_scored], torch.cat(hits).cpu()[:n_scored]
