"""Python's own standard library: ten megabytes of real text that every user already has."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt.data.source import files_fingerprint

LEFT_OUT = {
    *("test", "tests", "idle_test"),  # much of it generated, or text in odd encodings
    *("site-packages", "dist-packages"),  # installed by the user
    *("__pycache__", "ensurepip"),
}


@dataclass(frozen=True)
class PythonStdlib:
    """The sources of the running interpreter's standard library, one document per file."""

    val_fraction: float = 0.1
    name: str = "python_stdlib"

    def documents(self) -> Iterator[str]:
        """Yield each source file; those that are not UTF-8 are left out."""
        for path in self._paths():
            try:
                yield path.read_bytes().decode()
            except UnicodeDecodeError:
                continue

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents."""
        return files_fingerprint(_root(), self._paths())

    def _paths(self) -> list[Path]:
        root = _root()
        paths = [
            path
            for path in sorted(root.rglob("*.py"))
            if LEFT_OUT.isdisjoint(path.relative_to(root).parts)
        ]
        if not paths:
            raise FileNotFoundError(
                f"the sources of Python's standard library are not in {root}, as this Python came "
                f"without them; pass data=text data.path=<a file or folder of text>"
            )
        return paths


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))
