"""The checkpoints that are served, and the names by which requests choose one."""

import hashlib
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from nanogpt.checkpoint import read_record
from nanogpt.disk import display_name, find_files
from nanogpt.pretrained import CONFIG
from nanogpt.runs.directory import find_path, read_summary
from serving.engine.messages import Task

# Chat clients hide models whose ids contain these: they belong to other kinds of models.
HIDDEN = (
    *("embedding", "davinci", "curie", "moderation", "ada"),
    *("babbage", "tts", "whisper", "dall-e"),
)
# Of models whose ids begin so, they change the parameters of requests.
CHANGED = ("o1", "o3", "o4", "codex", "computer-use", "gpt-5")
_HIDDEN = re.compile("|".join(HIDDEN), re.IGNORECASE)
_SPLIT = "|".join(f"{word[0]}-{word[1:]}" for word in HIDDEN)
# Names that read like the ids of others that were changed.
_CHANGED = re.compile(f"{_SPLIT}|-searching-|^model-({'|'.join(CHANGED)})", re.IGNORECASE)

ENDINGS = ("", ".ckpt", ".pt")  # that a model's name may have


@dataclass(frozen=True)
class Entry:
    """A checkpoint that can be loaded; another `revision` means the file has other weights.

    `rank` is 0 for a run without a summary, and for a finished one the number of digits of its
    steps, at most 3: a trial of a few steps ranks below a training.
    """

    id: str
    name: str  # the run's own
    path: Path
    aliases: tuple[str, ...]
    created: int  # seconds since 1970
    revision: str
    rank: int
    task: Task | None  # None for a broken file, as max_model_len
    max_model_len: int | None  # tokens of the context
    size: int = 0  # bytes

    @property
    def key(self) -> tuple[str, str]:
        """The id and the revision."""
        return self.id, self.revision


class Registry:
    """The entries found under a `.ckpt`, a run, a Hugging Face model, or a directory of these.

    Names are keys of this table and never paths. `failures` has the time and the reason of each
    load that failed, by the entry's key.
    """

    def __init__(self, models: str, runs_dir: str = "runs", default: str | None = None) -> None:
        self.models = Path(models)  # it may appear later
        with suppress(FileNotFoundError):
            self.models = find_path(models, runs_dir)
        self.default_name = default
        self.entries: list[Entry] = []
        self.failures: dict[tuple[str, str], tuple[float, str]] = {}
        self.rescan()

    def rescan(self) -> bool:
        """Look again; return whether anything changed."""
        before = self.entries
        self.entries = find_entries(self.models)
        self._by_id = {entry.id: entry for entry in self.entries}
        return self.entries != before

    def default(self, task: Task | None = None) -> Entry | None:
        """Return the entry of requests that name none: the configured one, or the best for a task.

        Broken files and entries that could not be loaded come last.
        """
        if self.default_name:
            return self.find(self.default_name)

        def rank(entry: Entry) -> tuple[int, ...]:
            is_sound = entry.task is not None and entry.key not in self.failures
            return task is not None and entry.task == task, is_sound, entry.rank, entry.created

        return max(self.entries, key=rank, default=None)

    def get(self, id_: str) -> Entry | None:
        """Return the entry of an id."""
        return self._by_id.get(id_)

    def find(self, name: str) -> Entry | None:
        """Return the entry of an id or alias."""
        named = (entry for entry in self.entries if name in entry.aliases)
        return self.get(name) or next(named, None)


def find_entries(models: Path) -> list[Entry]:
    """Return an entry for each checkpoint: one file's, one run's, or those of all runs beneath.

    A directory may be empty: runs are served as they appear. No two have an id or alias in common.
    """
    entries: dict[str, Entry] = {}
    for path, name in sorted(_checkpoints(models), key=lambda found: (found[1], found[0])):
        with suppress(OSError):  # replaced or removed meanwhile
            entry = _entry(path, name)
            if entry.id in entries:  # of a directory whose name differs in its bytes only
                entry = replace(entry, id=f"{entry.id}-{_hash(repr(path))}")
            entries[entry.id] = entry
    found = sorted(entries.values(), key=lambda entry: entry.id)
    # Each name is the one entry's with the best claim to it: where there is `q`, not `a/q`.
    owners: dict[str, str] = {}
    for names in zip(*(entry.aliases for entry in found), strict=True):
        for entry, name in zip(found, names, strict=True):
            owners.setdefault(name, entry.id)
    own = [dict.fromkeys(n for n in e.aliases if owners[n] == e.id != n) for e in found]
    return [replace(e, aliases=tuple(names)) for e, names in zip(found, own, strict=True)]


def model_id(name: str) -> str:
    """Return an id for a run's name that no chat client hides or treats as another model's.

    It depends on the name alone and has letters of every script; where other characters are lost,
    or the name reads like one that was changed here, a hash of the name is appended.

    >>> model_id("中文模型"), model_id("gpt2-adamw"), model_id("o3"), model_id("Quick Start!")
    ('中文模型', 'gpt2-a-damw', 'model-o3', 'Quick-Start-5a9ed0')
    """
    name = unicodedata.normalize("NFC", name)
    is_ambiguous = _legible(name) != name or _CHANGED.search(name)
    return f"{_slug(name)}-{_hash(name)}" if is_ambiguous else _slug(name)


def _slug(name: str) -> str:
    slug = _HIDDEN.sub(lambda word: f"{word[0][0]}-{word[0][1:]}", _legible(name))
    slug = re.sub("-search(?=-)", "-searching", slug, flags=re.IGNORECASE)
    return f"model-{slug}" if slug.lower().startswith(CHANGED) else slug


def _legible(name: str) -> str:
    """Return the letters, marks and numbers of a name, `-` for what lies between."""
    legible = (c if c in "._-" or unicodedata.category(c)[0] in "LMN" else " " for c in name)
    return re.sub(" +", "-", "".join(legible)).strip("-.") or "model"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:6]


def _checkpoints(models: Path) -> Iterator[tuple[Path, str]]:
    """Yield the path and the name of each checkpoint."""
    if models.is_file():
        name = models.stem if models.stem != "last" else _run_dir(models.resolve()).name
        yield models, display_name(Path(name))
        return
    is_published = (models / CONFIG).is_file()
    for path in [models / CONFIG] if is_published else find_files(models, "last.ckpt", CONFIG):
        run = _run_dir(path)
        if path.name == CONFIG:
            path = run = path.parent
            is_whole = not run.name.startswith(".") and any(run.glob("*.safetensors"))
            if not (is_published or is_whole):
                continue
        relative = Path(run.resolve().name) if run == models else run.relative_to(models)
        yield path, display_name(relative)


def _run_dir(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _entry(path: Path, name: str) -> Entry:
    """Return an entry whose aliases are all of its names, the best claims first.

    Raises OSError for anything but files: reading a FIFO would block.
    """
    states = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
    states = [state for state in states if stat.S_ISREG(state.st_mode)]
    if not states:
        raise OSError(f"{path} is not a regular file")
    size, changed = sum(state.st_size for state in states), max(s.st_mtime_ns for s in states)
    id_ = model_id(name)
    revision = f"{changed:x}-{size:x}"
    names = ((id_, name), (name.rpartition("/")[2],), (_slug(name).lower(),))
    task, max_model_len = _read_record(path, revision)
    return Entry(
        id=id_,
        name=name,
        path=path,
        aliases=tuple(f"{n}{ending}" for ns in names for ending in ENDINGS for n in ns),
        created=changed // 10**9,
        revision=revision,
        rank=0 if path.is_dir() else _rank(_run_dir(path) / "summary.json"),
        task=task,
        max_model_len=max_model_len,
        size=size,
    )


def _rank(path: Path) -> int:
    """Return the rank of a run by its summary: see Entry."""
    with suppress(OSError, ValueError):  # there is none, or it is damaged
        return min(len(str(read_summary(path)["steps"])), 3)
    return 0


@lru_cache(4096)
def _read_record(path: Path, revision: str) -> tuple[Task | None, int | None]:
    """Return the task of a file's model and its context in tokens; None for a broken file.

    Raises OSError, which may pass and is not cached.
    """
    try:
        record = read_record(path)
        task: Task = "generate" if record["labels"] is None else "classify"
        return task, int(record["model"]["block_size"])
    except OSError:
        raise
    except Exception:  # whatever a file can do to its reader: reported when it is loaded
        return None, None
