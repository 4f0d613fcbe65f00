"""Who may import whom: the table that keeps the layers apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = {"train.py", "serve.py"}
CORE = {
    "model",
    "tokenizer",
    "prompts",
    "generation",
    "pretrained",
    "classifier",
    "checkpoint",
    "archive",
    "record",
    "weights",
    "optim",
    "splitmix",
    "hub",
    "tokenizer_files",
    "command",
    "disk",
    "text",
    "values",
    "runs.directory",
    "runs.identity",
}


def sources() -> list[Path]:
    files = [ROOT / name for name in sorted(ENTRY_POINTS) if (ROOT / name).exists()]
    return (
        files + sorted((ROOT / "nanogpt").rglob("*.py")) + sorted((ROOT / "serving").rglob("*.py"))
    )


def imported(path: Path, *, lazy: bool = True) -> set[str]:
    """Return the modules that a file imports; with lazy=False only those imported when it is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return names


def uses(names: set[str], package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in names)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_only_the_entry_points_know_hydra(path: Path) -> None:
    if relative(path) not in {*ENTRY_POINTS, "nanogpt/config.py"}:
        assert not uses(imported(path), "hydra")
        assert not uses(imported(path), "omegaconf")


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_only_data_training_and_train_know_lightning(path: Path) -> None:
    if not relative(path).startswith(("nanogpt/data/", "nanogpt/training/", "train.py")):
        assert not uses(imported(path), "lightning")


def test_data_and_training_never_import_each_other() -> None:
    for path in sources():
        if relative(path).startswith("nanogpt/data/"):
            assert not uses(imported(path), "nanogpt.training"), path
        if relative(path).startswith("nanogpt/training/"):
            assert not uses(imported(path), "nanogpt.data"), path


def test_runs_are_kept_without_training_or_data() -> None:
    for path in sources():
        if relative(path).startswith(("nanogpt/runs/", "nanogpt/ranks.py")):
            assert not uses(imported(path), "nanogpt.training"), path
            assert not uses(imported(path), "nanogpt.data"), path


@pytest.mark.parametrize("name", ["model", "tokenizer", "prompts"])
def test_the_foundations_import_nothing_of_ours(name: str) -> None:
    path = ROOT / "nanogpt" / f"{name}.py"
    if path.exists():
        allowed = {"nanogpt.pretrained"} if name == "model" else set()
        assert {n for n in imported(path) if uses({n}, "nanogpt")} <= allowed
        assert not uses(imported(path, lazy=False), "nanogpt")


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_imports_only_the_core(name: str) -> None:
    path = ROOT / "nanogpt" / f"{name.replace('.', '/')}.py"
    if path.exists():
        ours = {n for n in imported(path) if uses({n}, "nanogpt")}
        assert ours <= {"nanogpt"} | {f"nanogpt.{other}" for other in CORE}


def test_serving_keeps_to_the_core() -> None:
    for path in sources():
        if relative(path).startswith("serving/"):
            for package in ("lightning", "hydra", "nanogpt.data", "nanogpt.training"):
                assert not uses(imported(path), package), path
        if relative(path).startswith("serving/engine/"):
            assert not uses(imported(path), "fastapi"), path
        if relative(path).startswith("serving/api/"):
            assert not uses(imported(path), "torch"), path


def reached(module: str) -> set[str]:
    """Return all that importing one of our modules imports, through others of ours too."""
    names: set[str] = set()
    waiting = [module]
    while waiting:
        path = ROOT / waiting.pop().replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        new = imported(path, lazy=False) - names
        names |= new
        waiting += [name for name in new if uses({name}, "nanogpt")]
    return names


@pytest.mark.parametrize(
    "module",
    [
        "build",
        "evaluate",
        "export",
        "generate",
        "inspect",
        "prepare",
        "ranks",
        "runs.run",
        "values",
    ],
)
def test_it_is_imported_without_lightning_and_hydra(module: str) -> None:
    names = reached(f"nanogpt.{module}")
    assert not any(uses(names, package) for package in ("lightning", "hydra", "omegaconf"))


def modules_after(code: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter holds after running code."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_importing_the_package_is_light() -> None:
    assert not modules_after("import nanogpt") & {
        "torch",
        "lightning",
        "hydra",
        "omegaconf",
        "numpy",
    }


def test_the_library_names_bring_neither_lightning_nor_hydra() -> None:
    code = "from nanogpt import GPT, GPTConfig, Tokenizer, generate, load_checkpoint"
    assert not modules_after(code) & {"lightning", "hydra", "omegaconf"}


def test_the_tokenizer_alone_brings_no_torch() -> None:
    assert "torch" not in modules_after("import nanogpt.tokenizer")


def test_runs_are_read_without_torch() -> None:
    code = "import nanogpt.runs.directory, nanogpt.runs.identity, nanogpt.runs.metrics"
    assert not modules_after(code) & {"torch", "lightning", "hydra", "omegaconf"}


def test_a_front_end_brings_neither_torch_nor_what_training_needs() -> None:
    assert not modules_after("import serving.app") & {"torch", "lightning", "hydra", "omegaconf"}


def test_an_engine_that_has_loaded_a_model_holds_nothing_of_training(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.engine_models import Asked, generate, write_model
path = Path({str(tmp_path)!r})
write_model(path / "run" / "last.ckpt")
assert Asked(path).one(generate("1", [1, 2])).ids
import serving.engine.server"""
    assert not modules_after(code) & {"lightning", "hydra", "omegaconf", "fastapi"}
