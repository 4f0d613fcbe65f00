"""Every command of README.md and docs/ parses, every link leads somewhere."""

import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nanogpt.config import as_overrides

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")
PAGES = (*READMES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
RUN_ELSEWHERE = ("docs/EXTENDING.md",)  # by tests/test_extending.py
OTHER_PROGRAMS = (
    *("cd", "curl", "docker", "git", "lm-eval", "mypy", "pip", "pytest", "ruff", "srun"),
    *("transformers", "uvicorn", "."),
)
OTHER_MODULES = ("llama_cpp.server", "venv")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of each command, without comments and variables in front."""
    lines = [
        line
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if "..." not in line.partition("#")[0]  # a synopsis
    ]
    lines += [
        f"python train.py {arguments}"
        for arguments in re.findall(r"`(experiment=\S+ data\.path=\S+)`", text_of(page))
    ]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            if command:
                yield command


def without_flags(words: list[str]) -> list[str]:
    return words[2:] if words[:2] == ["--cfg", "job"] else words


def compose_command(config: str, overrides: list[str]) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        compose(config, overrides=as_overrides(overrides))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_ELSEWHERE])
def test_commands_parse(page: str) -> None:
    for words in commands(page):
        if words[0] in OTHER_PROGRAMS:
            continue
        if "train.py" in words:  # also behind torchrun
            overrides = without_flags(words[words.index("train.py") + 1 :])
            if overrides[:1] == ["-m"]:  # of a sweep, its first job
                first = re.compile(r"=(?:interval\(|range\()?([^,]+),.*")
                overrides = [first.sub(r"=\1", word) for word in overrides[1:]]
            compose_command("train", overrides)
        elif words[1] == "serve.py":
            compose_command("serve", without_flags(words[2:]))
        elif words[1] == "-m" and words[2].startswith("nanogpt."):
            import_module(words[2]).parser().parse_args(words[3:])
        elif words[1] == "-m":
            assert find_spec(words[2].partition(".")[0]) or words[2] in OTHER_MODULES, words
        else:
            assert (ROOT / words[1]).is_file(), words


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_valid(page: str) -> None:
    for block in blocks(page, "python"):
        if page not in RUN_ELSEWHERE:
            compile(block, page, "exec")
    for block in blocks(page, "json"):
        for line in block.splitlines():
            json.loads(line)


def test_both_languages_give_the_same_commands() -> None:
    assert list(commands("README.md")) == list(commands("README.zh-CN.md"))


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^):]*?)(?:#([^)]*))?\)", text_of(page))
    for path, anchor in links:
        target = ROOT / Path(page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in slugs(target), f"{path}#{anchor}"
