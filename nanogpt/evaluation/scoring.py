"""How likely a model finds texts after others: the one scorer behind every task.

A question is a context and continuations of it, in tokens. Its row is a tree: the context and what
continuations begin with alike stand in it once, and each token sees those on its way back to the
first. Logits, and the last block beyond its attention, are computed where something is scored and
nowhere else; of padding there is attention alone. Models with blocks of another class read each
continuation as a row of its own, through their own forward.

Shapes: B batch, T time, C channels, V vocabulary, R tokens of all rows, S scored places, N scored
tokens.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanogpt.model import GPT, Block, causal_attention, rotary_angles
from nanogpt.tokenizer import Tokenizer

BATCH_SIZE = 8  # questions of a forward
PRODUCT_ROWS = 32  # in a matrix product: what is left of a multiple is added in another order
ROW_MULTIPLE = 16  # tokens that a row's attention is padded to
TREE_TOKENS = 1024  # of a row: what its attention holds grows with their square
LOGITS_ROWS = 128  # of V logits, held at a time
PROGRESS_S = 10.0  # between lines of the log

Tokens = Sequence[int] | np.ndarray

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A context of at least one token, and what may follow it."""

    context: Tokens
    continuations: Sequence[Tokens]


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

    Raises ValueError where the model gives no finite likelihoods.
    """
    assert not model.training, "dropout would change the answers"
    pieces = [piece for i, q in enumerate(questions) for piece in _pieces(i, q, model)]
    answers = [[Answer(0.0, True)] * len(q.continuations) for q in questions]
    n_done, told = 0, time.monotonic()
    for batch in _batches(pieces, batch_size):
        for row, found in zip(batch, _answer_batch(model, batch), strict=True):
            own = answers[row.piece.question]
            if not all(math.isfinite(new.log_likelihood) for new in found):
                raise ValueError(
                    "the model gives no finite likelihoods: its weights are damaged, or its "
                    "training diverged; pass another checkpoint"
                )
            for place, new in zip(row.piece.places, found, strict=True):
                before = own[place]
                own[place] = Answer(
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
class _Piece:
    """Part of a question that fits the model: continuations, and their places in the question."""

    question: int
    context: Tokens
    continuations: Sequence[Tokens]
    places: Sequence[int]

    @property
    def is_chain(self) -> bool:
        """Whether nothing branches: attention is plainly causal."""
        return len(self.continuations) == 1

    @property
    def padded(self) -> int:
        """The tokens that its row has at most, as a multiple of ROW_MULTIPLE."""
        n_tokens = len(self.context) + sum(len(c) - 1 for c in self.continuations)
        return -(-n_tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def _pieces(number: int, question: Question, model: GPT) -> Iterator[_Piece]:
    """Yield continuations that fit together with their context, else each apart or in parts."""
    context, continuations = question.context, question.continuations
    assert len(context), "there is nothing to begin from"
    assert all(map(len, continuations)), "there is nothing to score"
    block_size = model.config.block_size
    together: list[int] = []
    n_tokens = len(context)
    for place, continuation in enumerate(continuations):
        if len(context) + len(continuation) - 1 > block_size:
            yield from _parts(number, place, context, continuation, block_size)
            continue
        branches = model.config.block is None and n_tokens + len(continuation) - 1 <= TREE_TOKENS
        if together and not branches:
            yield _Piece(number, context, [continuations[i] for i in together], together)
            together, n_tokens = [], len(context)
        together.append(place)
        n_tokens += len(continuation) - 1
    if together:
        yield _Piece(number, context, [continuations[i] for i in together], together)


def _parts(
    number: int, place: int, context: Tokens, continuation: Tokens, block_size: int
) -> Iterator[_Piece]:
    """Yield a continuation whole where it fits without its context, else in parts."""
    text = [*context, *continuation]
    step = len(continuation) if len(continuation) <= block_size else max(block_size // 2, 1)
    for start in range(len(context), len(text), step):
        scored = text[start : start + step]
        before = text[max(start + len(scored) - 1 - block_size, 0) : start]
        yield _Piece(number, before, [scored], [place])


def _batches(pieces: Sequence[_Piece], batch_size: int) -> Iterator[list["_Row"]]:
    """Yield rows of one padded length together, the longest first.

    So no computation of a row depends on its company, nor do, on a CPU, the bits of its answer.
    """
    alike: dict[tuple[int, bool], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        alike[piece.padded, piece.is_chain].append(piece)
    for _, group in sorted(alike.items(), key=lambda item: item[0], reverse=True):
        for start in range(0, len(group), batch_size):
            yield [_Row(piece) for piece in group[start : start + batch_size]]


class _Row:
    """A piece as a tree: its tokens, the place before each, and where each target is scored."""

    def __init__(self, piece: _Piece) -> None:
        n = len(piece.context)
        self.piece = piece
        self.input_ids = list(map(int, piece.context))
        self.parents = list(range(-1, n - 1))
        self.targets: list[tuple[int, int]] = []  # place, token: of one continuation after another
        places: dict[tuple[int, int], int] = {}  # of a token after a place
        for continuation in piece.continuations:
            place = n - 1
            *inner, last = map(int, continuation)
            for token in inner:
                self.targets.append((place, token))
                if (place, token) not in places:
                    places[place, token] = len(self.input_ids)
                    self.input_ids.append(token)
                    self.parents.append(place)
                place = places[place, token]
            self.targets.append((place, last))

    def mask(self) -> np.ndarray:
        """Return which tokens each token sees (T, T), padding included: those before it, itself."""
        mask = np.eye(self.piece.padded, dtype=bool)
        for place, parent in enumerate(self.parents[1:], start=1):
            mask[place] |= mask[parent]
        return mask


def _answer_batch(model: GPT, rows: Sequence[_Row]) -> list[list[Answer]]:
    places, targets, start = [], [], 0
    for row in rows:
        places += [start + place for place, _ in row.targets]
        targets += [token for _, token in row.targets]
        start += len(row.input_ids)
    scored, of_target = torch.tensor(places).unique(return_inverse=True)
    states = _scored_states(model, rows, scored)
    log_likelihoods, hits = _score(model, states, of_target, torch.tensor(targets))
    sizes = [len(c) for row in rows for c in row.piece.continuations]
    found = iter(
        Answer(float(part.sum()), bool(hit.all()))
        for part, hit in zip(log_likelihoods.split(sizes), hits.split(sizes), strict=True)
    )
    return [[next(found) for _ in row.piece.continuations] for row in rows]


def _scored_states(model: GPT, rows: Sequence[_Row], scored: Tensor) -> Tensor:
    """Return the final states (S, C) at places among the rows' tokens, and some more of padding.

    Linear maps take all tokens of all rows as one list; attention takes padded rows.
    """
    device = model.wte.weight.device
    masks = None if rows[0].piece.is_chain else np.stack([row.mask() for row in rows])  # (B, T, T)
    n_tokens = np.array([len(row.input_ids) for row in rows])
    is_token = np.arange(rows[0].piece.padded) < n_tokens[:, None]  # (B, T)
    depths = np.nonzero(is_token)[1] if masks is None else masks.sum(2)[is_token] - 1

    if model.config.block is not None:
        ids = torch.zeros(is_token.shape, dtype=torch.int64)
        ids[torch.from_numpy(is_token)] = torch.tensor([i for row in rows for i in row.input_ids])
        ids = ids[:, : model.config.block_size].to(device)
        return model.hidden_states(ids)[torch.from_numpy(is_token)[:, : ids.size(1)]][scored]

    def whole(values: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        values = torch.as_tensor(values)
        return F.pad(values, (0, -len(values) % PRODUCT_ROWS)).to(device)

    places = torch.from_numpy((is_token.cumsum() - 1).reshape(is_token.shape)).to(device)
    taken, scored = whole(np.flatnonzero(is_token)), whole(scored)
    mask = None if masks is None else torch.from_numpy(masks[:, None]).to(device)
    x, rotation = model.wte(whole([i for row in rows for i in row.input_ids])), None  # (R, C)
    positions = whole(depths)
    if model.config.position == "learned":
        x = x + model.wpe(positions)
    else:
        rotation = rotary_angles(positions, model.config.n_embd // model.config.n_head)
    for block in model.h:
        assert isinstance(block, Block)
        qkv = block.attn.qkv(block.ln_1(x), rotation)  # (R, H, D) each
        q, k, v = (part[places].transpose(1, 2) for part in qkv)  # (B, H, T, D)
        y = causal_attention(q, k, v, mask).transpose(1, 2).flatten(0, 1)[taken]
        if block is model.h[-1]:
            x, y = x[scored], y[scored]
        x = x + block.attn.c_proj(y.flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return model.ln_f(x)


def _score(model: GPT, states: Tensor, of_target: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability (N,) float64, and whether none is likelier (N,).

    `of_target` (N,) says which of the states (S, C) each target (N,) is to follow.
    """
    found = torch.empty(len(targets), dtype=torch.float64)
    hits = torch.empty(len(targets), dtype=torch.bool)
    for start in range(0, len(states), LOGITS_ROWS):
        logits = model.head(states[start : start + LOGITS_ROWS]).float()  # (<= LOGITS_ROWS, V)
        own = (of_target // LOGITS_ROWS == start // LOGITS_ROWS).nonzero().flatten()
        at, wanted = (of_target[own] - start).to(logits.device), targets[own].to(logits.device)
        found[own] = (logits[at, wanted] - logits.logsumexp(-1)[at]).cpu().double()
        hits[own] = (logits.argmax(-1)[at] == wanted).cpu()
    return found, hits
