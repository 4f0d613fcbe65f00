"""The recipes of docs/EXTENDING.md, in a package outside the repository."""

import csv
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import train
from nanogpt.checkpoint import load_checkpoint
from nanogpt.evaluate import main as evaluate
from nanogpt.generate import main as generate
from nanogpt.support import mixes_by_attend
from tests.conftest import TINY_RUN

PAGE = (Path(__file__).parent.parent / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def files(text: str) -> dict[str, str]:
    """Return the named code blocks: those whose first line is a comment with a path."""
    blocks = re.findall(r"^```\w+\n(# (\S+\.\w+)\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {name: block for block, name in blocks}


def commands(recipe: str) -> list[list[str]]:
    """Return the arguments of every command of a recipe."""
    blocks = re.findall(r"^```bash\n(.*?)^```", RECIPES[recipe], re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the current folder one that holds the files of all recipes."""
    for name, text in files(PAGE).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "my_package" / "__init__.py").touch()
    lines = [f"Line {i}: the square of {i} is {i * i}.\n" for i in range(400)]
    (tmp_path / "text.txt").write_text("".join(lines))
    pairs = [{"context": f"Line {i}: the", "good": " square", "bad": "%}~"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def run(words: list[str], *more: str) -> Path:
    """Train with a command of the page, in small; return the run's directory."""
    assert words[0] == "train.py"
    words = words[1:]
    n_options = 2 if words[0] == "--config-dir" else 0
    options, typed = words[:n_options], words[n_options:]
    keys = {word.partition("=")[0] for word in (*typed, *more)}
    corpus = [] if "data" in keys else ["data.path=text.txt"]
    small = [word for word in (*TINY_RUN, *corpus) if word.partition("=")[0] not in keys]
    name = [] if "name" in keys else ["name=run"]
    assert train.main([*options, *small, *name, *typed, *more]) == 0
    names = [word.removeprefix("name=") for word in (*name, *typed, *more) if "name=" in word]
    return Path("runs") / next(name for name in names if "=" not in name)


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return found


def column(run_dir: Path, name: str) -> dict[int, float]:
    """Return the values of a column of metrics.csv by step."""
    with open(run_dir / "metrics.csv", encoding="utf-8") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def test_there_are_eight_recipes_each_with_code_and_a_command() -> None:
    assert len(RECIPES) == 8
    assert all(files(body) and commands(title) for title, body in RECIPES.items())


def test_a_text_data_set(folder: Path) -> None:
    first, second = commands("A text data set")
    manifests = []
    for words, n_documents in ((first, 2000), (second, 3000)):
        run_dir = run(words, f"name=squares_{n_documents}")
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert (config["data"]["n_documents"], summary(run_dir)["steps"]) == (n_documents, 12)
        assert "The square of " in (run_dir / "samples.txt").read_text()
        assert f"--config-dir={folder / 'my_conf'} " in config["command"]
        manifests = list(folder.glob("data/squares-byte-*/manifest.json"))
    assert len(manifests) == 2


def test_a_sweep_finds_options_of_ones_own(folder: Path) -> None:
    words = ["-m", "--config-dir", "my_conf", "data=squares", *TINY_RUN[1:], "seed=1,2"]
    assert train.main([*words, "~callbacks.samples", "max_steps=2"]) == 0
    assert len(list(folder.glob("runs/*/*/summary.json"))) == 2


def test_a_data_module_continues_to_the_same_bits(folder: Path) -> None:
    (words,) = commands("A data module")
    whole = run(words, "name=whole")
    assert (whole / "summary.json").exists()
    run(words, "name=stopped", "schedule=constant", "max_steps=6")
    grown = run(words, "name=stopped", "schedule=constant", "max_steps=12")
    at_once = run(words, "name=at_once", "schedule=constant", "max_steps=12")
    assert summary(grown)["weights_sha256"] == summary(at_once)["weights_sha256"]
    assert column(grown, "train/loss") == column(at_once, "train/loss")


def test_a_data_module_gives_the_same_steps_in_any_micro_batch(folder: Path) -> None:
    (words,) = commands("A data module")
    losses = [column(run(words, f"name=mb{n}", f"micro_batch={n}"), "val/loss")[12] for n in (2, 8)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_a_callback(folder: Path) -> None:
    own, stock = commands("A callback")
    logged = column(run(own), "weight_norm")
    assert list(logged) == list(range(1, 13))
    weights = [p.detach() for p in load_checkpoint("run").model.parameters()]
    assert logged[12] == pytest.approx(sum(float((w**2).sum()) for w in weights) ** 0.5, rel=1e-5)
    mode = stock[-1].replace("patience: 2", "patience: 1, mode: max")  # the loss falls, so it stops
    early = summary(run([*stock[:-1], mode], "name=early"))
    assert (early["steps"], early["stopped"].partition(":")[0]) == (8, "EarlyStopping")


def test_a_logger(folder: Path) -> None:
    own, several = commands("A logger")
    run_dir = run(own)
    rows = [json.loads(line) for line in (run_dir / "all.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == column(run_dir, "train/loss")
    pytest.importorskip("tensorboard")
    both = run(several, "name=both")
    assert any(both.glob("tensorboard/events.*"))
    assert column(both, "train/loss") == losses


def test_an_optimizer_and_a_schedule(folder: Path) -> None:
    own, stock = commands("An optimizer, a schedule")
    rates = column(run(own), "learning_rate")
    assert rates == pytest.approx({step: 1e-3 * step / 20 for step in range(1, 13)})
    sgd = run(stock, "name=sgd")
    assert set(column(sgd, "learning_rate").values()) == {0.1}
    config = yaml.safe_load((sgd / "config.yaml").read_text())
    assert config["optim"] == {
        "_target_": "torch.optim.SGD",
        "lr": 0.1,
        "momentum": 0.9,
    }


def test_a_tokenizer_travels_with_its_checkpoint_and_a_task_scores_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, written = commands("A tokenizer")
    tokenizer = load_checkpoint(run(words)).tokenizer
    assert tokenizer.name == "words"
    assert tokenizer.decode(tokenizer.encode("Line 3: the square")) == "Line 3: the square"
    assert len(tokenizer.encode(" square")) == 1
    del sys.modules["my_package.tokenizers"]
    capsys.readouterr()
    assert generate(written[2:]) == 0
    assert capsys.readouterr().out.startswith("Line 3")
    assert "my_package.tokenizers" not in sys.modules

    (scored,) = commands("An evaluation task")
    assert evaluate(scored[2:]) == 0
    (row,) = json.loads((folder / "scores.json").read_text())
    assert row["task"] == "my_package.tasks.minimal_pairs"
    assert row["results"].keys() == {"acc", "acc_stderr"}
    assert "minimal_pairs" in Path("runs/words/report.html").read_text(encoding="utf-8")


def test_a_model_block(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, written, *of_attention = commands("A model block")
    run(words)
    capsys.readouterr()
    assert generate(written[2:]) == 0
    assert capsys.readouterr().out.startswith("def ")
    runpy.run_path("my_script.py")
    n_parameters = int(capsys.readouterr().out)
    assert n_parameters == summary(Path("runs/swiglu"))["n_params"]
    assert generate(written[2:-2]) == 1  # without --allow-module
    assert "--allow-module my_package" in capsys.readouterr().err
    run(of_attention[0])
    assert generate(of_attention[1][2:]) == 0
    model = load_checkpoint("multi_query", allow_modules=["my_package"]).model
    assert mixes_by_attend(model)


def handed_over(node: str) -> list[str]:
    """Return the parameter names that the page's table has for a node."""
    (names,) = re.findall(rf"^\| {re.escape(node)} \| (.*) \|$", PAGE, re.MULTILINE)
    return [word for word in re.findall(r"`(\w+)`", names) if word not in ("Path", "str")]


def test_constructors_receive_the_arguments_of_the_table(folder: Path) -> None:
    of_data = handed_over("`data`: a data module")
    of_callbacks = handed_over("`callbacks.*`")
    of_loggers = [*of_callbacks, *handed_over("`logger.*`, `module`")]
    assert (len(of_data), len(of_callbacks), len(of_loggers)) == (6, 7, 19)
    probes = (
        ("Data", "windows.RandomWindows", of_data, "'text.txt', seed, block_size, tokens_per_step"),
        ("Callback", "callbacks.WeightNorm", of_callbacks, ""),
        ("Logger", "loggers.JsonLines", of_loggers, "run_dir"),
    )
    text = "from my_package import callbacks, loggers, windows\nRECEIVED = {}\n"
    for name, base, names, passed in probes:
        text += f"""
class {name}({base}):
    def __init__(self, {", ".join(names)}):
        super().__init__({passed})
        RECEIVED[{name!r}] = dict(locals())
"""
    Path("my_package/probes.py").write_text(text)
    Path("my_conf/data/probe.yaml").write_text("_target_: my_package.probes.Data\n")
    words = ["train.py", "--config-dir", "my_conf", "data=probe", "tokenizer=byte"]
    words += ["callbacks.own._target_=my_package.probes.Callback"]
    run([*words, "logger.own._target_=my_package.probes.Logger"])
    received = sys.modules["my_package.probes"].RECEIVED
    assert received["Data"]["seed"] == received["Callback"]["seed"] == 1337
    assert received["Callback"]["run_dir"] == Path(received["Callback"]["save_dir"])
    assert received["Logger"]["data"].__class__.__name__ == "Data"
    assert received["Logger"]["max_steps"] == 12
