"""What tests share: a small corpus and a small run, a server, and a browser."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Each worker of pytest-xdist computes on its share of the cores: more threads wait for each other.
N_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // N_WORKERS)))

ROOT = Path(__file__).parent.parent
TINY_RUN = (
    "data=text",
    "tokenizer=byte",
    "model.block_size=16",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=16",
    "tokens_per_step=128",
    "max_steps=12",
    "compile=false",
    "threads=1",
    "trainer.precision=32-true",
    "callbacks.log_every_n_steps=1",
    "callbacks.validation.every_n_steps=4",
    "callbacks.validation.tokens=128",
    "callbacks.checkpoint.every_n_steps=4",
    "callbacks.samples.every_n_steps=6",
    "callbacks.samples.max_new_tokens=8",
)


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of made-up prose, different in every line."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"Line {i}: the square of {i} is {i * i}.\n" for i in range(400)))
    return path


@pytest.fixture
def tiny_run(corpus_path: Path, tmp_path: Path) -> list[str]:
    """The command line of a run of a second, its directories in tmp_path."""
    return [
        *TINY_RUN,
        f"data.path={corpus_path}",
        f"runs_dir={tmp_path / 'runs'}",
        f"data_dir={tmp_path / 'data'}",
        "name=tiny",
    ]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run train.py in a fresh process and return its output."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **options.pop("env", {})},
            timeout=300,
            **options,
        )

    return run


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run train.py in this process and return its exit code."""
    import train

    def run(*arguments: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        return train.main(arguments)

    return run


@pytest.fixture(params=["full", "left"])
def failing_output(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Options of subprocess under which neither output can be written.

    They are a full disk, or a pipe whose reader has left.
    """
    reader, writer = os.pipe()
    os.close(reader)
    if request.param == "full":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    yield {"stdout": writer, "stderr": writer}
    os.close(writer)


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """Where `url` looks for runs; there are none, but for tests that write some."""
    return tmp_path / "runs"


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    """An engine that echoes; tests of other answers have their own."""
    from tests.fake_engine import FakeEngine

    return FakeEngine(f"unix:{tmp_path}/e")


@pytest.fixture
def url(engine: Any, runs_dir: Path) -> Iterator[str]:
    """A server before the engine, without keys."""
    from serving.api.settings import ApiSettings
    from tests.front_end import serve

    with serve(engine, ApiSettings(runs_dir=str(runs_dir))) as address:
        yield address


@pytest.fixture(scope="module")  # while it is open, no event loop of asyncio can run in this thread
def browser() -> Iterator[Any]:
    """A real browser, for tests of the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
    )
    if not path:
        pytest.skip("there is no Chromium here; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP rebound.example 127.0.0.1"]
        chromium = started.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()
