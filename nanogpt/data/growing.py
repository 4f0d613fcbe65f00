"""Training on a corpus while it is being prepared: `data.wait=N` begins with its first N shards.

Another process prepares. Rows are shuffled within windows of N shards (`order.WindowedOrder`), so
that which row a step sees does not depend on how far the preparation has come: a read that is too
early waits. The validation text is that of the first N shards, then and ever after.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout

from nanogpt.data.corpus import MANIFEST, TOKENIZER, Corpus, digest, read_json, read_tokenizer
from nanogpt.data.preparing import Preparation, lock, make_folder, make_unless_made, open_made
from nanogpt.data.shards import TokenStream
from nanogpt.data.writer import JOURNAL, SPLITS

POLL_S = 0.5
GIVEN_UP_AFTER_S = 20.0  # without a process that prepares

log = logging.getLogger(__name__)


def open_growing(preparation: Preparation, wait: int) -> Corpus:
    """Return the corpus as soon as its first `wait` shards are there; see to it that more come.

    Its fingerprint stands for what was asked for, its first shards and `wait`: it is known before
    the end, and the same after it. Raises ChildProcessError where the preparation stops early, and
    as `open_corpus` does where it was finished before.
    """
    directory = preparation.directory
    window_tokens = wait * preparation.shard_tokens
    preparer = None
    if (directory / MANIFEST).exists():
        open_made(preparation)  # which refuses what is damaged or another corpus
    else:
        make_folder(directory)
        preparer = _prepare_beside(preparation)
    train = GrowingStream(directory, "train", preparer)
    train.n_tokens(at_least=window_tokens)
    _, progress = _progress(directory)
    val_shards = [directory / shard["file"] for shard in progress["val"]["shards"][:wait]]
    tokenizer = read_tokenizer(directory / TOKENIZER)
    first = [shard["sha256"] for shard in progress["train"]["shards"][:wait]]
    what = [tokenizer.fingerprint, preparation.identity, first, "in windows of shards", wait]
    return Corpus(
        directory=directory,
        tokenizer=tokenizer,
        train=train,
        val=TokenStream(val_shards),
        fingerprint=digest(what)[:16],
        manifest={},
        window_tokens=window_tokens,
    )


class GrowingStream:
    """The tokens of one split of a corpus that may not be finished; reading waits for its shards.

    It can be sent to another process.
    """

    def __init__(self, directory: Path, split: str, preparer: BaseProcess | None = None) -> None:
        self._directory = directory
        self._split = split
        self._preparer = preparer
        self._shards: list[str] = []
        self._stream = TokenStream([])
        self._complete = False

    def __len__(self) -> int:
        """Return how many tokens there will be: waits for the end of the preparation."""
        while not self._complete:
            self._await_more()
        return len(self._stream)

    def n_tokens(self, at_least: int) -> int:
        """Return how many tokens there are, once there are `at_least` or all."""
        while len(self._stream) < at_least and not self._complete:
            self._await_more()
        return len(self._stream)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens from `start` up to `stop`, (stop - start,) int64."""
        self.n_tokens(at_least=stop)
        return self._stream.read(start, stop)

    def _await_more(self) -> None:
        """Return once there are more shards, or there will be no more.

        Raises ChildProcessError where nobody prepares them.
        """
        idle_since = time.monotonic()
        while True:
            complete, progress = _progress(self._directory)
            shards = [shard["file"] for shard in progress[self._split]["shards"]]
            if complete or len(shards) > len(self._shards):
                self._stream = TokenStream([self._directory / shard for shard in shards])
                self._shards, self._complete = shards, complete
                return
            if _someone_prepares(self._directory):
                idle_since = time.monotonic()
            failed = self._preparer is not None and self._preparer.exitcode not in (None, 0)
            if failed or time.monotonic() - idle_since > GIVEN_UP_AFTER_S:
                raise ChildProcessError(
                    f"the preparation of {self._directory} has stopped before its end; mend what "
                    "it said and issue the command again: both continue"
                )
            time.sleep(POLL_S)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_preparer": None}  # a process can be asked by its parent only


def _progress(directory: Path) -> tuple[bool, dict[str, Any]]:
    """Return whether a corpus is complete, and how far each split has come."""
    if (directory / MANIFEST).exists():
        return True, read_json(directory / MANIFEST)["splits"]
    if (directory / JOURNAL).exists():
        return False, read_json(directory / JOURNAL)["progress"]["splits"]
    return False, {split: {"shards": []} for split in SPLITS}


def _someone_prepares(directory: Path) -> bool:
    try:
        with lock(directory).acquire(blocking=False):
            return (directory / MANIFEST).exists()
    except Timeout:
        return True


def _prepare_beside(preparation: Preparation) -> BaseProcess:
    """Prepare in a process of its own, which ends with this one."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_prepare_quietly, args=(preparation, os.getpid()), daemon=True)
    process.start()
    return process


def _prepare_quietly(preparation: Preparation, parent: int) -> None:
    """Prepare behind a training, unless another process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training says when to end
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if hasattr(os, "nice"):
        os.nice(10)
    try:
        with lock(preparation.directory).acquire(timeout=POLL_S):
            make_unless_made(preparation)
    except Timeout:
        pass
    except (ValueError, OSError) as error:
        log.error("%s", error)
        raise SystemExit(1) from None


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
