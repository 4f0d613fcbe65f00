"""Tokens to text, a piece at a time: characters may take several tokens, stop strings too.

The pieces joined are the same text however the tokens came.
"""

import codecs
from collections.abc import Iterable, Sequence


class Detokenizer:
    """The text of one answer as it grows, up to the first stop string.

    Text is held back while it may be part of a character or of a stop string. Where a stop string
    is found, it and all after it are no part of the text; of two, the one that begins first.

    >>> detokenizer = Detokenizer([b"a", b"b\\xc3", b"\\xa4END", b"x"], ["END"])
    >>> detokenizer.feed([0, 1]), detokenizer.feed([2, 3]), detokenizer.stopped
    ('ab', 'ä', True)
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Iterable[str] = ()) -> None:
        self.stopped = False
        self.n_tokens = 0  # taken; none after a stop string
        self.n_told = 0  # of them, those whose text began within what was given out
        self._token_bytes = token_bytes
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._length = 0  # characters given out
        self.starts: list[int] = []  # where the text of each token begins

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that the next tokens make certain."""
        return "".join([self._feed(i) for i in ids])

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._until_stop(self._held + self._decoder.decode(b"", final=True))
        rest = text + self._held
        self._held = ""
        self._give(rest)
        if not self.stopped:
            self.n_told = self.n_tokens
        return rest

    def _feed(self, token: int) -> str:
        if self.stopped:
            return ""
        self.n_tokens += 1
        self.starts.append(self._length + len(self._held))
        text = self._decoder.decode(self._token_bytes[token])
        if self._stops:
            text = self._until_stop(self._held + text)
        self._give(text)
        return text

    def _give(self, text: str) -> None:
        self._length += len(text)
        while self.n_told < self.n_tokens and self.starts[self.n_told] < self._length:
            self.n_told += 1

    def _until_stop(self, text: str) -> str:
        """Return the text before a stop string, or before what may become one."""
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin the stop string."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
