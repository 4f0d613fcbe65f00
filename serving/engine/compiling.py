"""Compile the engine's kernels (kernels.cpp) once for each source, compiler and processor.

Nothing of torch is needed: an engine compiles while it still imports that.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-Wno-ignored-attributes")

log = logging.getLogger(__name__)


@lru_cache
def compiled_kernels() -> Future[Path | None]:
    """Return the library, which the first call begins to compile, or None where that cannot be.

    With NANOGPT_NO_KERNELS set there is none.
    """
    return ThreadPoolExecutor(1, "compile").submit(_compiled)


def _compiled() -> Path | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    unwanted = os.environ.get("NANOGPT_NO_KERNELS")
    if compiler is None or unwanted or platform.machine() != "x86_64":
        return None
    flags = " ".join((compiler, *FLAGS, processor_flags()))
    fingerprint = hashlib.sha256(SOURCE.read_bytes() + flags.encode()).hexdigest()[:16]
    path = _cache_dir() / f"kernels-{fingerprint}.so"
    return path if path.exists() or _compile(compiler, path) else None


def _compile(compiler: str, path: Path) -> bool:
    """Compile the kernels; linked without OpenMP, they use torch's, and its threads."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        unlinked, linked = f"{directory}/kernels.o", f"{directory}/kernels.so"
        for command in (
            [compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", unlinked],
            [compiler, "-shared", unlinked, "-o", linked],
        ):
            try:
                subprocess.run(command, capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = str(getattr(error, "stderr", error))[-500:]
                log.warning("no kernels, torch's are used: %s", reason)
                return False
        os.replace(linked, path)
    return True


def processor_flags() -> str:
    """Return the features of the processor as Linux lists them, elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def _cache_dir() -> Path:
    """Return the cache of compiled kernels, or a new directory where that cannot be written."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanogpt"
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    return Path(tempfile.mkdtemp(prefix="nanogpt-"))
