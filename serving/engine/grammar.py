"""Grammars that answers must follow, by llguidance: which tokens may come next.

    python serving/engine/grammar.py < GRAMMARS

prints why one of a JSON list of grammars cannot be used, "" where all can, within limits on stack,
memory and time that some grammars exceed. A front end runs it before the engine gets a grammar.
"""

import json
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

if TYPE_CHECKING:
    from nanogpt.tokenizer import Tokenizer

CHECK_S, CHECK_BYTES = 2, 2**30  # of a check: processor time and memory
CHECK_STACK_BYTES, STACK_BYTES = 4 * 2**20, 16 * 2**20  # a compiler recurses through a schema
PROBED = 16  # tokens of a text that a grammar must be able to begin
MAX_COMPILED = 64  # grammars that are kept for later requests
LIMITS = LLParserLimits(verbose_errors=False)

_compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")


class Matcher:
    """What may follow in one answer: a text of the grammar, and nothing after it."""

    def __init__(self, matcher: LLMatcher, end_id: int, ordinary: int) -> None:
        self._matcher, self._end_id, self._ordinary = matcher, end_id, ordinary

    def allowed(self, stop_ids: Collection[int]) -> bytes:
        """Return a bit for each token, the first ones lowest: 1 for those that may come next.

        Of special tokens, these are `stop_ids` where the text may end. Raises ValueError where the
        state is too large to compute.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError(_reason(self._matcher))
        bits = int.from_bytes(mask, "little")
        may_end, allowed = bits >> self._end_id & 1, bits & self._ordinary
        for i in stop_ids if may_end else ():
            allowed |= (1 << i) & ~self._ordinary
        return (allowed or bits).to_bytes(len(mask), "little")

    def take(self, token: int) -> bool:
        """Append a token; return whether the text is complete and nothing can follow."""
        return self._matcher.consume_token(token) and self._matcher.is_stopped()


class Grammars:
    """The grammars that a model's answers follow, each compiled once, in a thread.

    It is the tokenizer, too, as llguidance reads one: special tokens have names of their own.
    """

    bos_token_id = None

    def __init__(self, tokenizer: "Tokenizer") -> None:
        tokens = tokenizer.token_bytes()
        self.eos_token_id, self._encode = tokenizer.eot_id, tokenizer.encode
        self.tokens = [token or f"<{i}>".encode() for i, token in enumerate(tokens)]
        self.special_token_ids = [i for i, token in enumerate(tokens) if not token]
        self._ordinary = int("".join("1" if token else "0" for token in reversed(tokens)), 2)
        self._compiled: dict[str, Future[LLMatcher]] = {}

    def __call__(self, text: bytes) -> list[int]:
        """Return the ids of a text."""
        return self._encode(text.decode())

    def ready(self, grammar: str, on_ready: Callable[[], object]) -> bool:
        """Return whether a grammar is compiled, else begin to; `on_ready` is called after it."""
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            done = [known for known, future in self._compiled.items() if future.done()]
            for known in done[: len(self._compiled) + 1 - MAX_COMPILED]:
                del self._compiled[known]
            size = threading.stack_size(STACK_BYTES)  # of the thread that may be started
            compiled = _compiler.submit(lambda: compile_grammar(grammar, self._vocabulary))
            threading.stack_size(size)
            compiled.add_done_callback(lambda _: on_ready())
        self._compiled[grammar] = compiled
        return compiled.done()

    def matcher(self, grammar: str) -> Matcher | None:
        """Return the matcher of a new answer, None for "", which allows any text.

        Raises ValueError for a grammar that cannot be compiled.
        """
        if not grammar:
            return None
        # Copies share nothing: what one computes does not depend on the others.
        copy = self._compiled[grammar].result().deep_copy()
        return Matcher(copy, self.eos_token_id, self._ordinary)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(self))


def compile_grammar(grammar: str, vocabulary: LLTokenizer) -> LLMatcher:
    """Return the matcher of a grammar; raises ValueError for one that is invalid or too large."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
    probe = matcher.deep_copy()
    for _ in range(PROBED):
        mask = int.from_bytes(probe.compute_bitmask(), "little")
        if probe.is_stopped():
            break
        probe.consume_token((mask & -mask).bit_length() - 1)
    if probe.is_error():
        raise ValueError(_reason(probe))
    return matcher


def _reason(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())


def main() -> None:
    """Print why a grammar of the standard input cannot be used."""
    import resource

    resource.setrlimit(resource.RLIMIT_STACK, (CHECK_STACK_BYTES, CHECK_STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CHECK_S, CHECK_S))
    resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
    try:
        for grammar in json.load(sys.stdin):
            compile_grammar(grammar, LLTokenizer("byte"))
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()
