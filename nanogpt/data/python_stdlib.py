"""Python's standard library: ten megabytes of real text on every user's machine."""

import platform
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nanogpt.data.files import Reader
from nanogpt.data.source import Source, files_fingerprint
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
        documents = Reader(skip_bad=True).read(self._paths())
        readable = (text for text in documents if text is not None)
        return islice(readable, skip, None)  # ten megabytes: skipping by reading is quick

    def fingerprint(self) -> str:
        """Return a hash over the files' names and contents."""
        return files_fingerprint(_root(), [Path(path) for path in self._paths()])

    def description(self) -> dict[str, Any]:
        """Return Python's version."""
        return {"python": platform.python_version()}

    def _paths(self) -> list[str]:
        root = _root()
        paths = [
            str(path)
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
