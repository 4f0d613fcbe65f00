"""The page's pure JavaScript modules, by Node's test runner (tests/js/)."""

import shutil
import subprocess
from pathlib import Path

import pytest

NODE = shutil.which("node")
MODULES_WITHOUT_A_PACKAGE = (20, 19)  # since then Node reads serving/static/*.js as modules


def _version() -> tuple[int, ...]:
    if NODE is None:
        return (0,)
    shown = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, shown.strip().removeprefix("v").split(".")))


@pytest.mark.skipif(_version() < MODULES_WITHOUT_A_PACKAGE, reason="needs Node 20.19")
def test_pure_modules() -> None:
    assert NODE is not None
    files = sorted(map(str, (Path(__file__).parent / "js").glob("*.test.mjs")))
    done = subprocess.run([NODE, "--test", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n# pass 17\n" in done.stdout
