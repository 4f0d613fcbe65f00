"""A GPT that names the class of a text: a linear head on the last real token.

Shapes: B batch, T time, C channels, N texts, K classes.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nanogpt.generation import evaluating
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import Tokenizer

TEXTS_PER_BATCH = 32
ALL, HEAD = "all", "head"
Around = tuple[list[int], list[int]]  # the ids before and after a text
LAST_BLOCKS = re.compile(r"last_([1-9]\d*)")


class Classifier(GPT):
    """A GPT with one more matrix: from the state of a text's last token to its classes.

    The head starts at zero: before training all classes are equally likely. It has no bias, as the
    Hugging Face classifiers of GPT-2 that it is exported to. All else has the names and the shapes
    of a GPT's, so that it starts from any of them, and can still write.
    """

    def __init__(self, config: GPTConfig, n_labels: int) -> None:
        super().__init__(config)
        self.classes = nn.Linear(config.n_embd, n_labels, bias=False)
        nn.init.zeros_(self.classes.weight)

    @classmethod
    def from_model(cls, model: GPT, n_labels: int) -> "Classifier":
        """Return a classifier with the weights of a language model."""
        classifier = cls(model.config, n_labels)
        classifier.load_state_dict(model.state_dict(), strict=False)
        return classifier

    def language_model(self) -> GPT:
        """Return a GPT with the weights of all but the classes."""
        model = GPT(self.config)
        model.load_state_dict(self.state_dict(), strict=False)
        return model

    def class_logits(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the class logits (B, K) of texts (B, T) int64 of `lengths` (B,) tokens.

        What stands after a text's last token makes no difference: attention is causal.
        """
        return self.classify(self.hidden_states(input_ids), lengths)

    def classify(self, hidden_states: Tensor, lengths: Tensor) -> Tensor:
        """Return the class logits (B, K) of the hidden states (B, T, C) of texts."""
        rows = torch.arange(len(lengths), device=lengths.device)
        return self.classes(hidden_states[rows, lengths - 1])


def train_layers(model: Classifier, layers: str) -> None:
    """Freeze what is not to be trained: `layers` is all, head, or last_1, last_2, ...

    `head` leaves the new matrix alone to learn, last_N also the last N blocks and the final norm.
    Frozen parameters get no gradients and no optimizer state. Raises ValueError for other values.
    """
    n_layer = model.config.n_layer
    match = LAST_BLOCKS.fullmatch(str(layers))
    if layers not in (ALL, HEAD) and (match is None or int(match[1]) > n_layer):
        raise ValueError(
            f"classify.layers={layers!r} is unknown; pass all, head, or last_1 to last_{n_layer}"
        )
    trained: list[nn.Module] = [model] if layers == ALL else [model.classes]
    if match is not None:
        trained += [*model.h[n_layer - int(match[1]) :], model.ln_f]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    if not model.config.tie_embeddings:
        model.lm_head.requires_grad_(False)  # takes no part in a class


def encode_text(tokenizer: Tokenizer, text: str, block_size: int) -> tuple[list[int], bool]:
    """Return a text's ids between two `<|endoftext|>`, and whether it was cut to block_size.

    Pretraining puts the one before every document; the other, after it, has seen all of the text
    and always stands where the class is read.
    """
    ids = tokenizer.encode(text)
    return enclose(ids, tokenizer.eot_id, block_size), len(ids) > block_size - 2


def enclose(
    ids: Sequence[int], eot_id: int, block_size: int, around: Around | None = None
) -> list[int]:
    """Return a text's ids between two `<|endoftext|>`, or `around` it others, cut to block_size."""
    begin, end = around or ([eot_id], [eot_id])
    return [*begin, *ids[: block_size - len(begin) - len(end)], *end]


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of ids as one tensor (B, T) int64, T the longest, and their lengths (B,)."""
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True), torch.tensor([len(row) for row in rows])


@torch.no_grad()
def class_probabilities(
    model: Classifier, tokenizer: Tokenizer, texts: Sequence[str], around: Around | None = None
) -> Tensor:
    """Return the probability of each class for each text (N, K) float32, on the CPU."""
    block_size, device = model.config.block_size, model.classes.weight.device
    ids = [tokenizer.encode(text) for text in texts]
    rows = [enclose(row, tokenizer.eot_id, block_size, around) for row in ids]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    probabilities = torch.empty(len(rows), model.classes.out_features)
    with evaluating(model):
        for start in range(0, len(rows), TEXTS_PER_BATCH):
            batch = by_length[start : start + TEXTS_PER_BATCH]
            input_ids, lengths = pad([rows[i] for i in batch])
            logits = model.class_logits(input_ids.to(device), lengths.to(device))
            probabilities[batch] = logits.float().softmax(-1).cpu()
    return probabilities
