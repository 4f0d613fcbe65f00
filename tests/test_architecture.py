"""docs/ARCHITECTURE.md names files that exist, and the limits that it gives hold."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\b(?:(?:nanogpt|serving|conf|tests)/[\w./]*|(?:train|serve)\.py)", PAGE)
    assert len(set(named)) > 30
    assert [name for name in set(named) if not (ROOT / name).exists()] == []


def test_the_spine_is_short() -> None:
    spine = PAGE.partition("## The spine")[2].partition("\n## ")[0]
    files = re.findall(r"^\| `([\w/]+\.(?:py|yaml))` \|", spine, re.MULTILINE)
    assert len(files) == 11
    assert limit(r"under ([\d,]+) lines, and") > sum(map(n_lines, (ROOT / f for f in files)))


def test_the_product_is_small() -> None:
    files = [ROOT / "train.py", ROOT / "serve.py"]
    for package in ("nanogpt", "serving", "hydra_plugins"):
        files += (ROOT / package).rglob("*.py")
    assert limit(r"under ([\d,]+) lines of Python") > sum(map(n_lines, files))


def limit(pattern: str) -> int:
    (number,) = re.findall(pattern, PAGE)
    return int(number.replace(",", ""))


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
