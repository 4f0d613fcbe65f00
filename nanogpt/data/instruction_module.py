"""Conversations as packed rows of tokens, and their batches."""

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import validate_call

from nanogpt.data.instructions import Conversation, Instructions, text_of
from nanogpt.data.module import RowsDataModule, TokenizerChoice
from nanogpt.data.packing import PackedRows
from nanogpt.prompts import Template, find_template
from nanogpt.text import format_percent
from nanogpt.tokenizer import END_OF_TEXT, Tokenizer
from nanogpt.values import Count, Text

log = logging.getLogger(__name__)


class InstructionDataModule(RowsDataModule):
    """Conversations in a template, packed into rows that are shuffled anew in each pass.

    The training loss is on the `loss_on` tokens, responses or all, validation on responses. The
    data ends after `max_passes` over the training rows, None for never.
    """

    source_kind = Instructions
    source_error = (
        "has no conversations for stage=instruct; pass data=dolly, or data=instructions "
        "data.path=<a .jsonl of instructions and responses>"
    )

    @validate_call
    def __init__(
        self,
        *,
        template: Text,
        loss_on: Literal["responses", "all"] = "responses",
        max_passes: Count | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.template = find_template(template)
        if self.template.assistant[1] != END_OF_TEXT:
            raise ValueError(
                f"template={template} ends no response, so a model would not learn to stop; "
                "choose chat or alpaca"
            )
        self.special_tokens = tuple(self.template.special_tokens)
        self.loss_on = loss_on
        self.max_passes = max_passes

    def use_tokenizer(self, choice: TokenizerChoice) -> Tokenizer:
        """Encode and pack the conversations; the tokenizer returned has the special tokens.

        Raises ValueError where a split has no conversation that fits.
        """
        splits = self.source.splits()
        tokenizer = choice.make(map(text_of, splits["train"]))
        tokenizer = tokenizer.with_special_tokens(self.special_tokens)
        rows, self._facts = {}, {}
        for name, loss_on in (("train", self.loss_on), ("val", "responses")):
            rows[name], self._facts[name] = pack_conversations(
                splits[name], self.template, tokenizer, self.block_size, loss_on, name
            )
        hashes = (facts["sha256"] for facts in self._facts.values())
        identity = [tokenizer.fingerprint, self.template.name, self.block_size, self.loss_on]
        fingerprint = hashlib.sha256(repr([*identity, *hashes]).encode()).hexdigest()[:16]
        self.use_rows(rows["train"], rows["val"], fingerprint)
        if self.max_passes is not None:
            n_tokens = self.max_passes * len(self.train_rows) * self.block_size
            self.max_steps = -(-n_tokens // self.tokens_per_step)
        return tokenizer

    def facts(self) -> dict[str, Any]:
        return {"template": self.template.name, "loss_on": self.loss_on, "splits": self._facts}


def pack_conversations(
    conversations: Sequence[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    block_size: int,
    loss_on: str,
    split: str,
) -> tuple[PackedRows, dict[str, Any]]:
    """Return a split's conversations encoded and packed, and plain values for the summary.

    A conversation longer than a row loses its end ("cut"); one whose first response begins beyond
    the row is left out ("dropped"). "sha256" is that of all conversations, whole. Raises ValueError
    where none fits.
    """
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
            f"none of the {len(encoded)} conversations of the {split} split has a response within "
            f"block_size={block_size} tokens; use shorter ones or a model with a longer context"
        )
    rows = PackedRows.from_texts(texts, block_size)
    lines = (f"{json.dumps([vars(message) for message in one])}\n" for one in conversations)
    facts = {
        "examples": len(texts),
        "cut": n_cut,
        "dropped": len(encoded) - len(texts),
        "tokens": sum(len(ids) for ids, _ in texts),
        "rows": len(rows),
        "padding": rows.padding,
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }
    log.info(
        f"{split}: {len(texts):,} conversations, {n_cut:,} of them cut, in {len(rows):,} rows of "
        f"{block_size}, {format_percent(rows.padding)} padding; {facts['dropped']:,} left out, as "
        "no response begins within a row"
    )
    return rows, facts
