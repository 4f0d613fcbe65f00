"""Python's own standard library: ten megabytes of real text that every user already has."""

import platform
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.data.source import Extent, Source, files_fingerprint
from nanogpt.values import CHECKED, Share, Text

LEFT_OUT = {
    *("test", "tests", "idle_test"),  # much of it generated, or text in odd encodings
    *("site-packages", "dist-packages"),  # installed by the user
    *("__pycache__", "ensurepip"),
}


@dataclass(frozen=True, config=CHECKED)
class PythonStdlib(Source):
    """The sources of the running interpreter's standard library, one document per file."""

    val_fraction: Share = 0.1
    name: Text = "python_stdlib"

    def documents(self, skip: int = 0) -> Iterator[str]:
        """Yield each source file after the first `skip`; those that are not UTF-8 are left out."""
        return islice(self._all(), skip, None)  # ten megabytes: reading what is skipped is cheap

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents."""
        return files_fingerprint(_root(), self._paths())

    def extent(self) -> Extent:
        sizes = [path.stat().st_size for path in self._paths()]
        return Extent(files=len(sizes), download_bytes=0, text_bytes=sum(sizes))

    def description(self) -> dict[str, Any]:
        return {"python": platform.python_version()}

    def _all(self) -> Iterator[str]:
        for path in self._paths():
            try:
                yield path.read_bytes().decode()
            except UnicodeDecodeError:
                continue

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
