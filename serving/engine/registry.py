"""Which checkpoints there are to serve, and by which names they can be asked for."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# Chat clients hide models whose ids contain these: they belong to other kinds of models.
HIDDEN = (
    *("embedding", "davinci", "curie", "moderation", "ada"),
    *("babbage", "tts", "whisper", "dall-e"),
)
# Of models whose ids begin so, they change the parameters of requests.
CHANGED = ("o1", "o3", "o4", "codex", "computer-use", "gpt-5")


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
        self.entries = find_entries(self.models)

    def rescan(self) -> bool:
        """Look again; return whether anything changed."""
        before = self.entries
        self.entries = find_entries(self.models)
        return self.entries != before

    @property
    def default(self) -> Entry | None:
        """The entry for requests that name none: the configured one, else the newest."""
        if self.default_name:
            return self.find(self.default_name)
        return max(self.entries, key=lambda entry: entry.created, default=None)

    def find(self, name: str) -> Entry | None:
        """Return the entry of an id or alias."""
        by_id = [entry for entry in self.entries if name == entry.id]
        by_alias = [entry for entry in self.entries if name in entry.aliases]
        return next(iter(by_id + by_alias), None)


def find_entries(models: Path) -> list[Entry]:
    """Return an entry for each checkpoint: one file's, one run's, or those of all runs beneath.

    A directory may be empty: runs are served as they appear.
    """
    entries: list[Entry] = []
    for path, name in sorted(_checkpoints(models), key=lambda found: found[1]):
        try:
            entry = _entry(path, name)
        except FileNotFoundError:  # replaced or removed while we looked
            continue
        taken = {other.id for other in entries}
        ids = itertools.chain([entry.id], (f"{entry.id}-{n}" for n in itertools.count(2)))
        entries.append(replace(entry, id=next(id_ for id_ in ids if id_ not in taken)))
    return entries


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
    for path in models.rglob("last.ckpt"):
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        name = run.resolve().name if run == models else run.relative_to(models).as_posix()
        yield path, name


def _entry(path: Path, name: str) -> Entry:
    status = path.stat()
    slug = model_id(name)
    names = dict.fromkeys([name, name.rpartition("/")[2], slug])
    aliases = [f"{n}{ending}" for n in names for ending in ("", ".ckpt", ".pt")]
    return Entry(
        id=slug,
        path=path,
        aliases=tuple(alias for alias in aliases if alias != slug),
        created=int(status.st_mtime),
        revision=f"{status.st_mtime_ns:x}-{status.st_size:x}",
    )
