"""Who may import whom: the table of docs/ARCHITECTURE.md, directly and through others."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = {
    f"nanogpt.{name}"
    for name in (
        *("model", "tokenizer", "prompts", "generation", "pretrained", "classifier", "checkpoint"),
        *("weights", "optim", "muon", "splitmix", "hub", "tokenizer_files", "command"),
        *("dropout", "layers", "support", "detokenizer", "disk", "text", "values"),
        *("architectures", "published"),
        *("runs.directory", "runs.identity"),
    )
}
HYDRA, LIGHTNING, TORCH = ("hydra", "omegaconf"), ("lightning",), ("torch",)
DATA, TRAINING = ("nanogpt.data",), ("nanogpt.training",)

# Modules by prefix, what none of their statements imports, and the modules excepted.
NEVER = (
    (("",), HYDRA, ("serve", "nanogpt.config", "hydra_plugins")),
    (("",), LIGHTNING, ("train", *DATA, *TRAINING)),
    (DATA, TRAINING, ()),
    (TRAINING, DATA, ()),
    (("nanogpt.runs", "nanogpt.ranks", "nanogpt.report"), (*DATA, *TRAINING), ()),
    (("serving",), (*DATA, *TRAINING), ()),
    (("serving.engine",), ("fastapi",), ()),
    (("serving.api",), TORCH, ()),
)
COMMANDS = tuple(f"nanogpt.{name}" for name in ("evaluate", "export", "generate", "inspect"))
# The same of all that importing the modules imports, through others of ours too.
NOT_WHEN_IMPORTED = (
    ((*COMMANDS, "nanogpt.prepare"), (*LIGHTNING, *HYDRA), ()),
    (("nanogpt.build", "nanogpt.ranks", "nanogpt.values"), (*LIGHTNING, *HYDRA), ()),
    (("nanogpt.runs",), (*LIGHTNING, *HYDRA), ()),
    (("nanogpt.report",), (*LIGHTNING, *HYDRA, *TORCH, *DATA, *TRAINING), ()),
    (("serving",), (*LIGHTNING, *HYDRA, *DATA, *TRAINING), ()),
    (("serving.api",), TORCH, ()),
)


def is_under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(not p or module == p or module.startswith(f"{p}.") for p in prefixes)


def sources() -> dict[str, Path]:
    """Return the product's files by module."""
    files = [ROOT / "train.py", ROOT / "serve.py"]
    for package in ("nanogpt", "serving", "hydra_plugins"):
        files += (ROOT / package).rglob("*.py")
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


SOURCES = sources()


@cache
def imported(module: str, *, lazy: bool = True) -> frozenset[str]:
    """Return the modules that a file imports; with lazy=False only those imported when it is."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)}
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
    return frozenset(names)


def reached(module: str) -> set[str]:
    """Return all that importing a module imports, through others of ours too."""
    names: set[str] = set()
    waiting = [module]
    while waiting:
        new = imported(waiting.pop(), lazy=False) - names
        names |= new
        waiting += new & SOURCES.keys()
    return names


def test_no_module_imports_what_its_layer_may_not() -> None:
    for prefixes, forbidden, excepted in NEVER:
        for module in SOURCES:
            if is_under(module, prefixes) and not is_under(module, excepted):
                found = {name for name in imported(module) if is_under(name, forbidden)}
                assert not found, f"{module} imports {found}"


def test_nothing_forbidden_is_imported_through_others() -> None:
    for prefixes, forbidden, _ in NOT_WHEN_IMPORTED:
        for module in SOURCES:
            if is_under(module, prefixes):
                found = {name for name in reached(module) if is_under(name, forbidden)}
                assert not found, f"importing {module} imports {found}"


def test_the_core_imports_only_the_core() -> None:
    for module in CORE & SOURCES.keys():
        ours = {name for name in imported(module) & SOURCES.keys() if is_under(name, ("nanogpt",))}
        assert ours <= CORE | {"nanogpt"}, f"{module} imports {ours - CORE}"


def test_the_foundations_import_nothing_of_ours() -> None:
    allowed = {
        "model": {"nanogpt.dropout", "nanogpt.layers", "nanogpt.values"},
        "prompts": {"nanogpt.tokenizer"},
        "tokenizer": {"nanogpt.text"},
    }
    for name in ("dropout", "layers", "values", "model", "tokenizer", "prompts", "detokenizer"):
        ours = imported(f"nanogpt.{name}", lazy=False) & SOURCES.keys()
        assert ours <= allowed.get(name, set()), name


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
from tests.engine_models import InlineEngine, generate, write_model
path = Path({str(tmp_path)!r})
write_model(path / "run" / "last.ckpt")
assert InlineEngine(path).one(generate("1", [1, 2])).ids
import serving.engine.server"""
    assert not modules_after(code) & {"lightning", "hydra", "omegaconf", "fastapi"}
