"""Which checkpoints there are to serve, and by which names they can be asked for."""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from nanogpt.checkpoint import read_record

# Chat clients hide models whose ids contain these: they belong to other kinds of models.
HIDDEN = (
    *("embedding", "davinci", "curie", "moderation", "ada"),
    *("babbage", "tts", "whisper", "dall-e"),
)
# Of models whose ids begin so, they change the parameters of requests.
CHANGED = ("o1", "o3", "o4", "codex", "computer-use", "gpt-5")

ENDINGS = ("", ".ckpt", ".pt")  # that a model's name may have


@dataclass(frozen=True)
class Entry:
    """A checkpoint that can be loaded; another `revision` means the file has other weights."""

    id: str
    path: Path
    aliases: tuple[str, ...]
    created: int  # seconds since 1970
    revision: str


class Registry:
    """The entries found under a `.ckpt`, a run, or a directory of runs.

    Names are keys of this table and never paths.
    """

    def __init__(self, models: str, runs_dir: str = "runs", default: str | None = None) -> None:
        named = Path(runs_dir) / models
        self.models = named if named.exists() and not Path(models).exists() else Path(models)
        self.default_name = default
        self.entries: list[Entry] = []
        self.default_to_generate: Entry | None = None
        self.rescan()

    def rescan(self) -> bool:
        """Look again; return whether anything changed."""
        before = self.entries
        self.entries = find_entries(self.models)
        self.default_to_generate = self._default_to_generate()
        return self.entries != before

    @property
    def default(self) -> Entry | None:
        """The entry for requests that name none: the configured one, else the newest."""
        if self.default_name:
            return self.find(self.default_name)
        return max(self.entries, key=lambda entry: entry.created, default=None)

    def _default_to_generate(self) -> Entry | None:
        """Return what is the default for answers in text: not the newest where it classifies."""
        newest = sorted(self.entries, key=lambda entry: entry.created, reverse=True)
        if self.default_name:
            return self.default
        for entry in newest:
            with suppress(OSError):
                if _generates(entry.path, entry.revision):
                    return entry
        return self.default

    def check_default(self) -> None:
        """Raise ValueError where the configured default is none of the models."""
        if self.default_name and self.default is None:
            ids = ", ".join(entry.id for entry in self.entries) or "none"
            raise ValueError(
                f"default_model={self.default_name} is none of the models ({ids}); pass one of them"
            )

    def find(self, name: str) -> Entry | None:
        """Return the entry of an id or alias."""
        named = (entry for entry in self.entries if name == entry.id or name in entry.aliases)
        return next(named, None)


def find_entries(models: Path) -> list[Entry]:
    """Return an entry for each checkpoint: one file's, one run's, or those of all runs beneath.

    A directory may be empty: runs are served as they appear. No two have an id or alias in common.
    """
    entries: list[Entry] = []
    # A name that can be an id is that run's id, not that of one with a similar name.
    for path, name in sorted(_checkpoints(models), key=lambda f: (f[1] != model_id(f[1]), f[1])):
        try:
            entries.append(_entry(path, name, {other.id for other in entries}))
        except OSError:  # replaced or removed while we looked
            continue
    return _told_apart(sorted(entries, key=lambda entry: entry.id))


def model_id(name: str) -> str:
    """Return a name as an id that no chat client hides or treats as another model's.

    >>> model_id("Pretrain GPT2/adamw"), model_id("o3")
    ('pretrain-gpt2-a-damw', 'model-o3')
    """
    slug = re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "model"
    for word in HIDDEN:
        slug = slug.replace(word, f"{word[0]}-{word[1:]}")
    slug = slug.replace("-search-", "-searching-")
    return f"model-{slug}" if slug.startswith(CHANGED) else slug


def _checkpoints(models: Path) -> Iterator[tuple[Path, str]]:
    """Yield the path and the name of each checkpoint."""
    if models.is_file():
        name = models.stem
        if name == "last":
            parent = models.resolve().parent
            name = (parent.parent if parent.name == "checkpoints" else parent).name
        yield models, name
        return
    for directory, _, files in os.walk(models):  # passes over what vanishes meanwhile
        if "last.ckpt" in files:
            path = Path(directory) / "last.ckpt"
            run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
            name = run.resolve().name if run == models else run.relative_to(models).as_posix()
            yield path, name


def _entry(path: Path, name: str, taken: set[str]) -> Entry:
    """Return an entry whose aliases are all that it may be called, the best claims first."""
    status = path.stat()
    slug = model_id(name)
    ids = itertools.chain([slug], (f"{slug}-{n}" for n in itertools.count(2)))
    id_ = next(id_ for id_ in ids if id_ not in taken)
    names = ((id_, name), (name.rpartition("/")[2],))
    return Entry(
        id=id_,
        path=path,
        aliases=tuple(f"{n}{ending}" for ns in names for ending in ENDINGS for n in ns),
        created=int(status.st_mtime),
        revision=f"{status.st_mtime_ns:x}-{status.st_size:x}",
    )


@lru_cache(256)
def _generates(path: Path, revision: str) -> bool:
    """Return whether a file is a language model's, not a classifier's nor broken."""
    try:
        return read_record(path)["labels"] is None
    except OSError:  # may pass, and is not remembered
        raise
    except Exception:  # whatever a file can do to its reader: it is told when it is asked for
        return False


def _told_apart(entries: list[Entry]) -> list[Entry]:
    """Leave each name to the one entry with the best claim to it: where there is `q`, not `a/q`."""
    owners: dict[str, str] = {}
    for names in zip(*(entry.aliases for entry in entries), strict=True):
        for entry, name in zip(entries, names, strict=True):
            owners.setdefault(name, entry.id)
    own: dict[str, list[str]] = {entry.id: [] for entry in entries}
    for name, id_ in owners.items():
        if name != id_:
            own[id_].append(name)
    return [replace(entry, aliases=tuple(own[entry.id])) for entry in entries]
