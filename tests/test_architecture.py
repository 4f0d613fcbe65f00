"""docs/ARCHITECTURE.md names files that exist, and counts the spine's lines."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\b(?:(?:nanogpt|serving|conf|tests)/[\w./]*|(?:train|serve)\.py)", PAGE)
    assert len(set(named)) > 30
    assert [name for name in set(named) if not (ROOT / name).exists()] == []


def test_the_spine_has_as_many_lines_as_it_says() -> None:
    spine = PAGE.partition("## The spine")[2].partition("\n## ")[0]
    (said,) = re.findall(r"in reading order: ([\d,]+) lines", spine)
    files = re.findall(r"^\| `([\w/]+\.(?:py|yaml))` \|", spine, re.MULTILINE)
    assert len(files) == 12
    n_lines = sum(len((ROOT / name).read_text("utf-8").splitlines()) for name in files)
    assert n_lines == pytest.approx(int(said.replace(",", "")), rel=0.1)
