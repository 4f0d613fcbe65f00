"""Choose the next token of every row of logits, each by its own parameters and its own numbers.

Random numbers are a hash of (seed, position), so that a draw is the same in any company. What is
computed for a row looks at that row alone. On a GPU all rows are one batch, whose results are read
at once; only rows that need more candidates than the first ones are drawn again. A GPU's kernels
add in an order that depends on the number of rows, so that they get TILE_ROWS at a time. On a CPU,
where arithmetic takes longer than calls, consecutive rows of one kind are a batch.

Shapes: R rows, V vocabulary, K candidates, A adjusted tokens.
"""

import itertools
import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.generation import allowed_tokens
from nanogpt.splitmix import GAMMA, splitmix64
from serving.engine.forward import TILE_ROWS, upload
from serving.engine.messages import MIN_LOGPROB, EngineError, Logprobs, SamplingParams, Tokens
from serving.engine.scheduler import SequenceState

CANDIDATES = (256, 4096)  # likeliest tokens that are sorted; all only where they do not suffice
MAX_LOGITS = 2**19  # at a time on a CPU; of more, every sum has new pages from the system
MAX_TOP = 20  # likeliest tokens of a request
LEAST = -86.0  # logit below the likeliest: exp takes 5 to 30 times as long for smaller ones
MIN_TEMPERATURE = 1e-5  # below it the rounding of float32 logits decides: the likeliest is taken
UNCHANGED = np.array([[0.0], [1.0], [0.0], [0.0]])  # a token's logit, divided by 1
# To the logits of eight tokens, by a byte of a mask: masked_fill takes four times as long.
ADDED = torch.tensor([[0.0 if b >> i & 1 else -math.inf for i in range(8)] for b in range(256)])
T = TypeVar("T")
NO_NUMBERS = torch.empty(6, 0, 1, dtype=torch.float64)
GREEDY, DRAWN, FILTERED = range(3)  # kinds of rows; of the last, some tokens cannot be drawn


class How(NamedTuple):
    """What a batch of rows needs: a program of tensors is the same for the same values."""

    kinds: frozenset[int]
    is_summed: bool
    n_candidates: int
    has_logprobs: bool

    def general(self) -> "How":
        """Return one of six that include all others, whose rows get the same bits."""
        if self.kinds == {GREEDY}:
            return self
        kinds = frozenset((GREEDY, DRAWN, FILTERED)[: 2 + (FILTERED in self.kinds)])
        return self._replace(kinds=kinds, is_summed=True)


@torch.inference_mode()
def choose(logits: Tensor, sequences: list[SequenceState]) -> list[Tokens]:
    """Return the next token of each sequence, by its row of logits (R, V) float32.

    With `params.logprobs`, its log-probability and the likeliest tokens come with it. There may be
    more rows than sequences, to keep shapes the same. Raises ValueError where the logits of a row
    are not finite numbers.
    """
    if logits.is_cuda:
        return _choose(logits[: padded_rows(len(sequences))], sequences)
    logits = logits.cpu()  # mps has no float64
    n_rows, chosen = max(1, MAX_LOGITS // logits.size(-1)), list[Tokens]()
    for _, alike in itertools.groupby(sequences, lambda sequence: _kind(sequence.params)):
        while own := list(itertools.islice(alike, n_rows)):
            chosen += _choose(logits[len(chosen) : len(chosen) + len(own)], own)
    return chosen


def _choose(logits: Tensor, sequences: list[SequenceState], n_tried: int = 0) -> list[Tokens]:
    """Choose tokens; `n_tried` of the numbers of candidates are known not to suffice."""
    numbers, how = numbers_of(sequences, len(logits), logits.size(-1), n_tried)
    adjusted = _allowed(_adjusted(logits, sequences), sequences)
    rows = draw(logits, adjusted, upload(numbers, logits.device), how)[: len(sequences)].tolist()
    drawn = [drawn_tokens(s, row) for s, row in zip(sequences, rows, strict=True)]
    if short := [i for i, tokens in enumerate(drawn) if tokens is None]:
        n_rows = padded_rows(len(short)) if logits.is_cuda else len(short)
        again = _choose(logits[_padded(short, n_rows)], [sequences[i] for i in short], n_tried + 1)
        drawn = [tokens or again.pop(0) for tokens in drawn]
    return [tokens for tokens in drawn if tokens]


def padded_rows(n: int) -> int:
    """Return the number of rows of logits that are drawn on a GPU for n sequences."""
    return -(-n // TILE_ROWS) * TILE_ROWS


def numbers_of(
    sequences: list[SequenceState], n_rows: int, n_vocab: int, n_tried: int = 0
) -> tuple[Tensor, How]:
    """Return what `draw` takes for sequences; the first is repeated up to n_rows.

    The numbers are (6, R, 1), without rows where all are greedy.
    """
    numbers = [_numbers(sequence, n_vocab) for sequence in sequences]
    kinds = frozenset([int(row[0]) for row in numbers])
    has_logprobs = any(sequence.params.logprobs is not None for sequence in sequences)
    if kinds == {GREEDY}:
        return NO_NUMBERS, How(kinds, False, 0, has_logprobs)
    is_summed = any(kind == DRAWN or top_k == n_vocab for kind, _, _, top_k, *_ in numbers)
    n_candidates = [*(n for n in CANDIDATES if n <= n_vocab), n_vocab][n_tried]
    columns = torch.tensor(_padded(numbers, n_rows), dtype=torch.float64).T.contiguous()
    return columns[..., None], How(kinds, is_summed, n_candidates, has_logprobs)


def draw(logits: Tensor, adjusted: Tensor, numbers: Tensor, how: How) -> Tensor:
    """Return a row (R, 3) float64 for each row of logits (R, V), before and after adjustments.

    They are the token, the largest logit, and 0 where more candidates are needed; with logprobs,
    those of `_log_probabilities` follow. The host is not needed for it.
    """
    if not logits.is_cuda:
        return _draw(logits, adjusted, numbers, how)
    tiles = [slice(i, i + TILE_ROWS) for i in range(0, len(logits), TILE_ROWS)]
    return torch.cat([_draw(logits[i], adjusted[i], numbers[:, i], how) for i in tiles])


def _draw(logits: Tensor, adjusted: Tensor, numbers: Tensor, how: How) -> Tensor:
    largest = adjusted.amax(-1, keepdim=True)
    tokens = (adjusted if GREEDY in how.kinds else adjusted[:, :1]).argmax(-1)  # which takes long
    is_enough = torch.ones_like(largest[:, 0])
    if how.kinds != {GREEDY}:
        kind, temperature, uniforms, *filters = numbers  # (R, 1) each
        weights = (adjusted - largest).div_(temperature.to(logits.dtype))
        weights = F.threshold(
            weights.clamp_min_(LEAST).exp_(), 2 * math.exp(LEAST), 0.0, inplace=True
        )
        sums = weights.cumsum(-1, dtype=torch.float64) if how.is_summed else None
        if sums is not None and DRAWN in how.kinds:
            tokens = torch.where(kind[:, 0] == DRAWN, _sample(sums, uniforms), tokens)
        if FILTERED in how.kinds:
            among, is_enough = _sample_among(weights, sums, how.n_candidates, uniforms, *filters)
            tokens = torch.where(kind[:, 0] == FILTERED, among, tokens)
            is_enough |= kind[:, 0] != FILTERED
    found = [column.double()[:, None] for column in (tokens, largest[:, 0], is_enough)]
    if how.has_logprobs:
        found.append(_log_probabilities(logits, tokens))
    return torch.cat(found, -1)


def drawn_tokens(sequence: SequenceState, row: list[float]) -> Tokens | None:
    """Return the token of a row of `draw`, None where it needs more candidates.

    Raises ValueError where the row's logits are not finite numbers.
    """
    token, largest, is_enough, *logprobs = row
    if not math.isfinite(largest):
        raise ValueError("the model's logits are not finite numbers")
    tokens, n_top = sequence.tokens([int(token)]), sequence.params.logprobs
    tokens.logprobs = None if n_top is None else [_unpacked(logprobs, n_top)]
    return tokens if is_enough else None


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) of a seed and a position: 53 bits of SplitMix64, twice.

    >>> uniform(1, 2) == uniform(1, 2) != uniform(1, 3)
    True
    """
    return (splitmix64(splitmix64(seed + GAMMA) + position + GAMMA) >> 11) * 2.0**-53


def log_probabilities(logits: Tensor, tokens: list[int], n_top: list[int]) -> list[Logprobs]:
    """Return the log-probability of a token after each row of logits (R, V).

    With it come the `n_top` likeliest tokens of the row, at most MAX_TOP.
    """
    logits = logits if logits.is_cuda else logits.cpu()
    index = upload(torch.tensor(tokens, dtype=torch.int64), logits.device)
    rows = _log_probabilities(logits, index).tolist()
    return [_unpacked(row, n) for row, n in zip(rows, n_top, strict=True)]


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log-probabilities (R, 1 + 2 K) float64 after logits (R, V).

    That of the token (R,), the ids of the likeliest, and theirs.
    """
    logprobs = logits.log_softmax(-1).clamp_min(MIN_LOGPROB)
    best = logprobs.topk(min(MAX_TOP, logits.size(-1)))  # always as many: ties keep their order
    own = logprobs.gather(-1, tokens[:, None])
    return torch.cat([part.double() for part in (own, best.indices, best.values)], -1)


def _unpacked(row: list[float], n_top: int) -> Logprobs:
    """Return a row of `_log_probabilities`, with the `n_top` likeliest."""
    logprob, *best = row
    ids, values = best[: len(best) // 2], best[len(best) // 2 :]
    return logprob, [int(i) for i in ids[:n_top]], values[:n_top]


def _adjusted(logits: Tensor, sequences: list[SequenceState]) -> Tensor:
    """Return logits with penalties and bias; the same ones where no row has any.

    In this order: repetition divides what is positive and multiplies what is not (CTRL, section
    4.1); frequency and presence are subtracted, as the OpenAI API defines them; bias is added.
    """
    changes = _padded([_changes(sequence) for sequence in sequences], len(logits))
    n = max(own.shape[1] for own in changes)
    if n == 1 and all(own is UNCHANGED for own in changes):
        return logits
    # Of a row with fewer, the first one is repeated, which gives the same number again.
    columns = [own[:, np.arange(n) * (np.arange(n) < own.shape[1])] for own in changes]
    ids, *values = upload(torch.from_numpy(np.stack(columns, 1)), logits.device)
    factors, less, more = (value.to(logits.dtype) for value in values)
    old = logits.gather(-1, ids.long())
    new = torch.where(old > 0, old / factors, old * factors) - less + more
    return logits.scatter(-1, ids.long(), new)


def _allowed(logits: Tensor, sequences: list[SequenceState]) -> Tensor:
    """Return logits of minus infinity for what grammars forbid; the same ones without any.

    Raises EngineError for a grammar that has become too large.
    """
    try:
        masks = [
            s.matcher and s.matcher.allowed(() if s.params.ignore_eos else s.params.stop_ids)
            for s in sequences
        ]
    except ValueError as error:
        reason = f"The grammar became too large for this answer ({error}); use a simpler one."
        raise EngineError("invalid", reason) from error
    n_bytes = max(len(mask or b"") for mask in masks)
    if not n_bytes:
        return logits
    rows = _padded([mask or b"\xff" * n_bytes for mask in masks], len(logits))
    bits = torch.frombuffer(bytearray().join(rows), dtype=torch.uint8).view(len(rows), n_bytes)
    added = F.embedding(upload(bits, logits.device).int(), upload(ADDED, logits.device))
    return added.flatten(1)[:, : logits.size(-1)].add_(logits)


def _padded(items: list[T], n: int) -> list[T]:
    return items + items[:1] * (n - len(items))


def _changes(sequence: SequenceState) -> np.ndarray:
    """Return what changes a row's logits (4, A): ids, divisors, what is subtracted, and added."""
    p = sequence.params
    n_seen = len(sequence.ids) if p.repetition_penalty != 1 else 0
    n_counted = len(sequence.ids) - sequence.n_prompt
    n_counted = n_counted if p.frequency_penalty or p.presence_penalty else 0
    if not (n_seen or n_counted or p.logit_bias):
        return UNCHANGED
    given = (sequence.ids[:n_seen], sequence.ids[-n_counted:] * (n_counted > 0), [*p.logit_bias])
    seen, answer, biased = (np.array(ids, np.int64) for ids in given)
    counted, counts = np.unique(answer, return_counts=True)
    ids = np.unique(np.concatenate((seen, counted, biased)))
    changes = np.zeros((4, len(ids)))
    changes[0], changes[1] = ids, 1.0
    changes[1, np.searchsorted(ids, seen)] = p.repetition_penalty
    less = np.float32(p.frequency_penalty) * counts.astype(np.float32)
    changes[2, np.searchsorted(ids, counted)] = less + np.float32(p.presence_penalty)
    changes[3, np.searchsorted(ids, biased)] = list(p.logit_bias.values())
    return changes


def _kind(p: SamplingParams) -> int:
    if p.temperature < MIN_TEMPERATURE:
        return GREEDY
    filters = p.top_k is not None or (p.top_p is not None and p.top_p < 1) or p.min_p
    return FILTERED if filters else DRAWN


def _numbers(sequence: SequenceState, n_vocab: int) -> tuple[float, ...]:
    """Return a row's kind, temperature, random number, top_k, top_p and min_p."""
    p, kind = sequence.params, _kind(sequence.params)
    if kind == GREEDY:
        return kind, 1.0, 0.0, 1, 1.0, 0.0
    top_k, top_p = min(p.top_k or n_vocab, n_vocab), 1.0 if p.top_p is None else p.top_p
    number = uniform(p.seed, len(sequence.ids) + sequence.n_ahead)
    return float(kind), p.temperature, number, top_k, top_p, p.min_p or 0.0


def _sample(sums: Tensor, numbers: Tensor) -> Tensor:
    """Return the index (R,) of each row of running sums (R, K) at which its number (R, 1) lies."""
    total = sums[:, -1:]
    below = total.nextafter(torch.zeros_like(total))
    mass = torch.minimum(numbers * total, below)  # the product may round up
    return torch.searchsorted(sums, mass, right=True)[:, 0].clamp_max(sums.size(-1) - 1)


def _sample_among(
    weights: Tensor,
    sums: Tensor | None,
    n: int,
    numbers: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample among the n likeliest tokens (R, V), filtered by top_k, top_p, min_p in this order.

    `sums` (R, V) of all weights are needed for rows without top_k. Returns tokens (R,) and whether
    the n are sure to hold all that may be drawn (R,).
    """
    best = weights.topk(n)
    w, is_all = best.values, top_k == weights.size(-1)
    sums_of_best = w.cumsum(-1, dtype=torch.float64)
    total = sums_of_best.gather(-1, top_k.long().clamp_max(n) - 1)
    if sums is not None:  # a plain sum adds in another order alone
        total = torch.where(is_all, sums[:, -1:], total)
    allowed = allowed_tokens(w, sums_of_best, top_k, top_p * total, min_p)
    tail = (sums_of_best[:, -1:] >= top_p * total) & (top_p < 1) | (w[:, -1:] < min_p)
    is_enough = (top_k <= n) | is_all & tail  # at n = V always
    index = _sample(torch.where(allowed, w, 0).cumsum(-1, dtype=torch.float64), numbers)
    return best.indices.gather(-1, index[:, None])[:, 0], is_enough[:, 0]
