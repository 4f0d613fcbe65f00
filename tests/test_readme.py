"""Every command of the README parses, and both READMEs give the same ones."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nanogpt.config import as_overrides

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")


def blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(readme: str) -> list[str]:
    lines = [line for block in blocks(readme, "bash") for line in block.splitlines()]
    inline = re.findall(r"`(experiment=\S+ data\.path=\S+)`", (ROOT / readme).read_text("utf-8"))
    return [part.strip() for line in lines for part in line.split("&&")] + [
        f"python train.py {arguments}" for arguments in inline
    ]


@pytest.mark.parametrize("command", commands("README.md"))
def test_a_command_parses(command: str) -> None:
    words = shlex.split(command, comments=True)
    if "train.py" in words:
        overrides = words[words.index("train.py") + 1 :]
        if overrides[:1] == ["-m"]:  # of a sweep, its first job
            overrides = [re.sub(r"=([^,]+),.*", r"=\1", word) for word in overrides[1:]]
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            compose("train", overrides=as_overrides(overrides))
    elif "serve.py" in words:
        overrides = words[words.index("serve.py") + 1 :]
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            compose("serve", overrides=overrides)
    elif words[:2] == ["python", "-m"]:
        import_module(words[2]).parser().parse_args(words[3:])
    else:
        assert words[0] in ("pip", "pytest", "curl", "uvicorn")


@pytest.mark.parametrize("readme", READMES)
def test_the_library_example_is_python(readme: str) -> None:
    for block in blocks(readme, "python"):
        compile(block, readme, "exec")


def test_both_languages_give_the_same_commands() -> None:
    assert commands("README.md") == commands("README.zh-CN.md")


@pytest.mark.parametrize("readme", READMES)
def test_every_link_to_a_file_leads_somewhere(readme: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)[)#]", (ROOT / readme).read_text(encoding="utf-8"))
    assert all((ROOT / link).exists() for link in links)
