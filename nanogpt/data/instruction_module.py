"""Conversations as packed rows of tokens, and their batches."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from nanogpt.data.instructions import (
    Conversation,
    Instructions,
    conversations_sha256,
    text_of,
)
from nanogpt.data.module import CHECK_ARGUMENTS, RowsDataModule, TokenizerChoice
from nanogpt.data.packing import PackedRows
from nanogpt.data.source import name_of
from nanogpt.prompts import Template, find_template
from nanogpt.text import format_percent
from nanogpt.tokenizer import Tokenizer
from nanogpt.values import Count, Text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedSplit:
    """One split's rows, and plain values for the summary.

    A conversation longer than a row lost its end ("cut"); one whose first response begins beyond
    the row was left out ("dropped"). "sha256" is that of all conversations, whole.
    """

    rows: PackedRows
    facts: dict[str, Any]


@dataclass(frozen=True)
class PackedConversations:
    """Both splits in rows of one length; `fingerprint` stands for all their tokens."""

    train: PackedSplit
    val: PackedSplit
    fingerprint: str


class InstructionDataModule(RowsDataModule):
    """Conversations in a template, packed into rows that are shuffled anew in each pass.

    The training loss is on the `loss_on` tokens, responses or all. The data ends after `max_passes`
    over the training rows, None for never.
    """

    @CHECK_ARGUMENTS
    def __init__(
        self,
        *,
        source: Any,
        template: Text,
        loss_on: Literal["responses", "all"] = "responses",
        max_passes: Count | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if not isinstance(source, Instructions):
            raise ValueError(
                f"stage=instruct learns from conversations and data={name_of(source)} has none; "
                "pass data=dolly, or data=instructions data.path=<a .jsonl of instructions and "
                "responses>"
            )
        self.source = source
        self.template = find_template(template)
        self.special_tokens = tuple(self.template.special_tokens)
        self.loss_on = loss_on
        self.max_passes = max_passes

    def use_tokenizer(self, choice: TokenizerChoice) -> Tokenizer:
        """Encode and pack the conversations; the tokenizer returned has the special tokens."""
        splits = self.source.splits()
        tokenizer = choice.make(map(text_of, splits["train"]))
        tokenizer = tokenizer.with_special_tokens(self.special_tokens)
        packed = pack_conversations(splits, self.template, tokenizer, self.block_size, self.loss_on)
        self.packed = packed
        self.use_rows(packed.train.rows, packed.val.rows, packed.fingerprint)
        if self.max_passes is not None:
            n_tokens = self.max_passes * len(packed.train.rows) * self.block_size
            self.max_steps = -(-n_tokens // self.tokens_per_step)
        return tokenizer

    def setup(self, stage: str) -> None:
        """Log the number of passes over the training rows in the trainer's steps."""
        if stage == "fit":
            n_steps = self._attached_trainer().max_steps
            tokens_per_pass = len(self.train_rows) * self.block_size
            passes = n_steps * self.tokens_per_step / tokens_per_pass
            log.info("%s steps are %.1f passes over the training conversations", n_steps, passes)

    def facts(self) -> dict[str, Any]:
        splits = {"train": self.packed.train.facts, "val": self.packed.val.facts}
        return {"template": self.template.name, "loss_on": self.loss_on, "splits": splits}


def pack_conversations(
    splits: Mapping[str, Sequence[Conversation]],
    template: Template,
    tokenizer: Tokenizer,
    block_size: int,
    loss_on: str = "responses",
) -> PackedConversations:
    """Return both splits encoded and packed.

    The training loss is on responses or on all tokens, validation always on responses. Raises
    ValueError where a split has no conversation that fits.
    """
    if not template.teaches_end:
        raise ValueError(
            f"template={template.name} ends no response, so a model would not learn to stop; "
            "choose chat or alpaca"
        )
    train = _packed("train", splits["train"], template, tokenizer, block_size, loss_on)
    val = _packed("val", splits["val"], template, tokenizer, block_size, "responses")
    hashes = (split.facts["sha256"] for split in (train, val))
    identity = [tokenizer.fingerprint, template.name, block_size, loss_on, *hashes]
    fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return PackedConversations(train, val, fingerprint)


def _packed(
    name: str,
    conversations: Sequence[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    block_size: int,
    loss_on: str,
) -> PackedSplit:
    with ThreadPoolExecutor() as pool:  # tokenizing releases the GIL
        encoded = list(pool.map(lambda one: template.encode(tokenizer, one), conversations))
    texts = []
    n_cut = 0
    for ids, is_response in encoded:
        if any(is_response[: block_size + 1]):
            scored = is_response if loss_on == "responses" else [True] * len(ids)
            texts.append((ids[: block_size + 1], scored[: block_size + 1]))
            n_cut += len(ids) > block_size + 1
    if not texts:
        raise ValueError(
            f"none of the {len(encoded)} conversations of the {name} split has a response within "
            f"block_size={block_size} tokens; use shorter ones or a model with a longer context"
        )
    rows, n_dropped = PackedRows.from_texts(texts, block_size), len(encoded) - len(texts)
    log.info(
        f"{name}: {len(texts):,} conversations, {len(rows.ids):,} tokens in {len(rows):,} rows of "
        f"{block_size}, {format_percent(rows.padding)} of them padding"
    )
    if n_cut or n_dropped:
        log.info(
            f"{name}: {n_cut:,} conversations longer than a row lost their end, {n_dropped:,} were "
            "left out because no response begins within it"
        )
    facts = {
        "examples": len(texts),
        "cut": n_cut,
        "dropped": n_dropped,
        "tokens": len(rows.ids),
        "rows": len(rows),
        "padding": rows.padding,
        "sha256": conversations_sha256(conversations),
    }
    return PackedSplit(rows, facts)
