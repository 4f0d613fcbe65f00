"""Convert a stream of tokens to text: characters and stop strings may span several tokens.

The joined pieces do not depend on how the tokens were grouped.
"""

import codecs
import sys
from bisect import bisect_left
from collections.abc import Iterable, Sequence


class Detokenizer:
    """Incremental decoder of one answer, up to its first stop string.

    Text that may be part of a character or of a stop string is held back. A stop string and all
    text after it are dropped; of several, the one that begins first counts.

    >>> detokenizer = Detokenizer([b"a", b"b\\xc3", b"\\xa4END", b"x"], ["END"])
    >>> detokenizer.feed([0, 1]), detokenizer.feed([2, 3]), detokenizer.stopped
    ('ab', 'ä', True)
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Iterable[str] = ()) -> None:
        self.stopped = False
        self.starts: list[int] = []  # offset in characters of each token, none after a stop string
        self._token_bytes = token_bytes
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._length = 0  # characters emitted

    @property
    def n_tokens(self) -> int:
        """The number of tokens up to a stop string."""
        return len(self.starts)

    @property
    def n_emitted(self) -> int:
        """The number of tokens whose text begins within the emitted text."""
        return bisect_left(self.starts, self._length)

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that the next tokens complete."""
        text = ""
        for i in ids:
            if self.stopped:
                break
            self.starts.append(self._length + len(self._held))
            text += self._emit(self._decoder.decode(self._token_bytes[i]))
        return text

    def finish(self) -> str:
        """Return the text that was held back; an incomplete character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._emit(self._decoder.decode(b"", final=True), final=True)
        if not self.stopped:
            self._length = sys.maxsize  # tokens without text are emitted, too
        return text

    def _emit(self, text: str, *, final: bool = False) -> str:
        """Return the text before a stop string, or before what may become one."""
        if self._stops:
            text = self._held + text
            found = [start for stop in self._stops if (start := text.find(stop)) >= 0]
            self.stopped = bool(found)
            n_held = 0 if final else max(_overlap(text, stop) for stop in self._stops)
            end = min(found, default=len(text) - n_held)
            text, self._held = text[:end], "" if self.stopped else text[end:]
        self._length += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin the stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
