"""Choose the next token of every row of logits, each by its own parameters and its own numbers.

Random numbers are a hash of (seed, position), so that a draw is the same in any company. What is
computed for a row looks at that row alone, and rows that need less work are not held up by others.

Shapes: R rows, V vocabulary, K candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt.generation import allowed_tokens
from nanogpt.splitmix import GAMMA, splitmix64
from serving.engine.messages import MIN_LOGPROB, Logprobs, SamplingParams, Tokens
from serving.engine.scheduler import SequenceState

CANDIDATES = (256, 4096)  # likeliest tokens that are sorted; all only where they do not suffice
MAX_LOGITS = 2**19  # at a time on a CPU; of more, every sum has new pages from the system
MAX_TOP = 20  # likeliest tokens of a request
MIN_TEMPERATURE = 1e-5  # below it the rounding of float32 logits decides: the likeliest is taken


@torch.inference_mode()
def choose(logits: Tensor, sequences: list[SequenceState]) -> list[Tokens]:
    """Return the next token of each sequence, by its row of logits (R, V) float32.

    With `params.logprobs`, its log-probability and the likeliest tokens come with it. Raises
    ValueError where the logits of a row are not finite numbers.
    """
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
    n = len(logits) if logits.is_cuda else max(1, MAX_LOGITS // logits.size(-1))
    groups = [slice(i, i + n) for i in range(0, len(logits), n)]
    return [tokens for rows in groups for tokens in _choose(logits[rows], sequences[rows])]


def _choose(logits: Tensor, sequences: list[SequenceState]) -> list[Tokens]:
    adjusted = _adjusted(logits, sequences)
    if not adjusted.amax(-1).isfinite().all():  # false for any that is not a number, too
        raise ValueError("the model's logits are not finite numbers")
    tokens = adjusted.argmax(-1)
    drawn = [i for i, s in enumerate(sequences) if s.params.temperature >= MIN_TEMPERATURE]
    for filters, sample in ((False, _sample), (True, _sample_filtered)):
        if rows := [i for i in drawn if _filters(sequences[i].params) == filters]:
            own = [sequences[i] for i in rows]
            tokens[rows] = sample(_weights(adjusted[rows], own), own)
    ids = tokens.tolist()
    chosen = [s.tokens([token]) for s, token in zip(sequences, ids, strict=True)]
    if rows := [i for i, s in enumerate(sequences) if s.params.logprobs is not None]:
        n_top = [sequences[i].params.logprobs or 0 for i in rows]
        found = log_probabilities(logits[rows], [ids[i] for i in rows], n_top)
        for i, logprobs in zip(rows, found, strict=True):
            chosen[i].logprobs = [logprobs]
    return chosen


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
    logprobs = logits.log_softmax(-1).clamp_min(MIN_LOGPROB)
    index = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    own = logprobs.gather(-1, index[:, None])[:, 0].tolist()
    best = logprobs.topk(min(MAX_TOP, logits.size(-1)))  # always as many: ties keep their order
    rows = zip(own, best.indices.tolist(), best.values.tolist(), n_top, strict=True)
    return [(logprob, ids[:n], values[:n]) for logprob, ids, values, n in rows]


def _adjusted(logits: Tensor, sequences: list[SequenceState]) -> Tensor:
    """Return logits with penalties and bias; the same ones where no row has any."""
    rows = [i for i, sequence in enumerate(sequences) if _adjusts(sequence.params)]
    if rows:
        logits = logits.clone()
        for i in rows:
            _adjust(logits[i], sequences[i])
    return logits


def _adjusts(p: SamplingParams) -> bool:
    penalties = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1
    return bool(penalties or p.logit_bias)


def _filters(p: SamplingParams) -> bool:
    """Return whether only some of the tokens can be drawn."""
    return p.top_k is not None or (p.top_p is not None and p.top_p < 1) or bool(p.min_p)


def _adjust(row: Tensor, sequence: SequenceState) -> None:
    """Change one row (V,): repetition, frequency, presence, then bias.

    Repetition divides what is positive and multiplies what is not (CTRL, section 4.1); the others
    subtract, as the OpenAI API defines them.
    """
    p, device = sequence.params, row.device
    if p.repetition_penalty != 1:
        seen = torch.tensor(sequence.ids, device=device).unique()
        old = row[seen]
        row[seen] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
    answer = sequence.ids[sequence.n_prompt :]
    if answer and (p.frequency_penalty or p.presence_penalty):
        seen, counts = torch.tensor(answer, device=device).unique(return_counts=True)
        row[seen] -= p.frequency_penalty * counts + p.presence_penalty
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), device=device)
        row[ids] += torch.tensor(list(p.logit_bias.values()), device=device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None].to(like.dtype)


def _weights(logits: Tensor, sequences: list[SequenceState]) -> Tensor:
    """Return probabilities (R, V), the likeliest token's taken as 1."""
    temperatures = _column([s.params.temperature for s in sequences], logits)
    return (logits - logits.amax(-1, keepdim=True)).div_(temperatures).exp_()


def _sample(weights: Tensor, sequences: list[SequenceState]) -> Tensor:
    """Return the index (R,) of each row of weights (R, K) at which its number lies."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    numbers = [uniform(s.params.seed, len(s.ids)) for s in sequences]
    total = sums[:, -1:].contiguous()
    mass = torch.tensor(numbers, dtype=sums.dtype, device=sums.device)[:, None] * total
    mass = torch.minimum(mass, total.nextafter(torch.zeros_like(total)))  # it may round up
    return torch.searchsorted(sums, mass, right=True)[:, 0].clamp_max(sums.size(-1) - 1)


def _sample_filtered(weights: Tensor, sequences: list[SequenceState]) -> Tensor:
    tokens = torch.zeros(len(sequences), dtype=torch.int64, device=weights.device)
    rows = list(range(len(sequences)))
    for n in (*CANDIDATES, weights.size(-1)):
        if rows and n <= weights.size(-1):
            of_rows, enough = _sample_among(weights[rows], n, [sequences[i] for i in rows])
            tokens[rows] = of_rows
            rows = [i for i, done in zip(rows, enough.tolist(), strict=True) if not done]
    return tokens


def _sample_among(weights: Tensor, n: int, sequences: list[SequenceState]) -> tuple[Tensor, Tensor]:
    """Sample among the n likeliest tokens (R, V), filtered by top_k, top_p, min_p in this order.

    Returns tokens (R,) and whether the n are sure to hold all that may be drawn (R,).
    """
    n_vocab = weights.size(-1)
    best = weights.topk(n)
    w = best.values
    sums = w.cumsum(-1, dtype=torch.float64)
    params = [sequence.params for sequence in sequences]
    top_k = _column([min(p.top_k or n_vocab, n_vocab) for p in params], sums)
    top_p = _column([1.0 if p.top_p is None else p.top_p for p in params], sums)
    min_p = _column([p.min_p or 0.0 for p in params], sums)
    total = sums.gather(-1, top_k.long().clamp_max(n) - 1)
    if (is_all := top_k == n_vocab).any():  # a plain sum adds in another order alone
        total = torch.where(is_all, weights.cumsum(-1, dtype=torch.float64)[:, -1:], total)
    allowed = allowed_tokens(w, sums, top_k, top_p * total, min_p)
    tail = (sums[:, -1:] >= top_p * total) & (top_p < 1) | (w[:, -1:] < min_p)
    enough = (top_k <= n) | is_all & tail  # at n = n_vocab always
    index = _sample(torch.where(allowed, w, 0), sequences)
    return best.indices.gather(-1, index[:, None])[:, 0], enough[:, 0]
