"""What the engine counts: requests, tokens, and how long they took."""

from bisect import bisect_left
from dataclasses import dataclass, field

from serving.engine.messages import Histogram

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass
class Durations:
    """How often something took how long."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total += seconds

    def histogram(self) -> Histogram:
        """Return a copy of what was counted."""
        return Histogram(list(BOUNDS_S), list(self.counts), self.total)


@dataclass
class Counters:
    """Totals since the engine started."""

    requests: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    queue_s: Durations = field(default_factory=Durations)
    first_token_s: Durations = field(default_factory=Durations)
    inter_token_s: Durations = field(default_factory=Durations)
