"""Compiled training on two ranks: one graph, and the losses of a run that is not compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_train import ROOT, fit, metrics

# The compiler's front end and autograd without its code generation, which takes half a minute. As
# the script of this process, it is the script of the ranks too.
SCRIPT = """
import atexit, functools, json, os, sys
import torch
from torch._dynamo.utils import counters

torch.compile = functools.partial(torch.compile, backend="aot_eager")

def write():
    if "RANK" in os.environ:
        with open(f"counters_{os.environ['RANK']}.json", "w") as file:
            json.dump({name: dict(found) for name, found in counters.items()}, file)

atexit.register(write)
import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_ranks_compile_one_graph_and_reach_the_same_losses(
    tiny_run: list[str], tmp_path: Path
) -> None:
    steps = ("max_steps=4", "micro_batch=2", "callbacks.validation.every_n_steps=2")
    options = [*tiny_run, *steps, "callbacks.samples.every_n_steps=2", "optim=adamw"]
    fit(*options)
    script = tmp_path / "compiled.py"
    script.write_text(SCRIPT)
    ranks = ("compile=true", "trainer.devices=2", "trainer.accelerator=cpu", "name=compiled")
    done = subprocess.run(
        [sys.executable, str(script), *options, *ranks],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        counters = json.loads((tmp_path / f"counters_{rank}.json").read_text())
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters.get("graph_break")
    columns = ("step", "train/loss", "train/grad_norm", "val/loss")
    alone, compiled = (
        [float(value or 0) for row in metrics(tmp_path / "runs" / name, *columns) for value in row]
        for name in ("tiny", "compiled")
    )
    assert compiled == pytest.approx(alone, rel=1e-5)
