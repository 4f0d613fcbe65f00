"""How commands end, and output that cannot be written."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.command import run_command
from nanogpt.config import explain_failure

POSIX = pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
WORK = """
import logging, sys
from nanogpt.command import flush_output, run_command
from nanogpt.runs.log import print_text
def work(write=print):
    for _ in range(20_000):
        write("a line")
    open(sys.argv[1], "x").close()
"""


def failing(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too long\nwith more"), "a.command: too long\n"),
        (OSError(), "a.command: OSError\n"),  # without a message
    ],
)
def test_an_error_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("a.command", lambda: failing(error)) == 1
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8"
            ),
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "can't allocate memory: you tried to allocate 4 bytes. Error code 12 (Cannot allocate "
            "memory)",
        ),
    ],
)
def test_out_of_memory_is_one_sentence(
    error: Exception, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("a.command", lambda: failing(error)) == 1
    assert capsys.readouterr().err.startswith(f"a.command: out of memory ({found}); pass a smaller")
    assert explain_failure(error, {}).startswith(
        f"out of memory ({found}); free memory, or pass micro_batch=1, activation_"
    )


def test_an_interrupted_command_prints_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command("a.command", lambda: failing(KeyboardInterrupt()), interrupted="again")
    assert code == 130
    assert capsys.readouterr().err == "a.command: again\n"


def test_a_mistake_of_the_program_is_not_swallowed() -> None:
    with pytest.raises(KeyError):
        run_command("a.command", lambda: failing(KeyError("x")))


@POSIX
def test_a_log_that_cannot_be_printed_ends_nothing(
    failing_output: dict[str, Any], tmp_path: Path
) -> None:
    log = "work(print_text); work(logging.getLogger().warning); flush_output()"
    work = WORK.replace('"x"', '"a"') + log
    command = [sys.executable, "-c", work, str(tmp_path / "made")]
    assert subprocess.run(command, **failing_output).returncode == 0
    assert (tmp_path / "made").exists()


@POSIX
@pytest.mark.parametrize(
    ("where", "code", "stderr"),
    [
        ("left", 0, ""),
        ("full", 1, "a.command: [Errno 28] No space left on device"),
    ],
)
def test_a_command_whose_product_is_its_output_ends_where_that_fails(
    where: str, code: int, stderr: str, tmp_path: Path
) -> None:
    work = WORK + 'sys.exit(run_command("a.command", work))'
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", work, str(tmp_path / "made")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=writer if where == "left" else full, stderr=subprocess.PIPE, text=True
        )
    os.close(writer)
    assert done.returncode == code
    assert done.stderr.startswith(stderr)
    assert done.stderr.count("\n") == bool(stderr)
    assert not (tmp_path / "made").exists()
