"""Compiled training on two ranks: its graphs, and the losses of a run that is not compiled."""

import json
import sys
from pathlib import Path

import pytest

import train
from nanogpt.ranks import LAUNCHER
from tests.test_train import ROOT, fit, metrics

# The compiler's front end and autograd without its code generation, which takes half a minute; and
# ranks with a backend for each device, as those on GPUs have. As the script of this process, it is
# that of the ranks too.
SCRIPT = """
import atexit, functools, json, os, sys
import torch
import torch.testing._internal.distributed.fake_pg
from torch._dynamo.utils import counters

join = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend: join("cpu:gloo,cuda:fake")
torch.compile = functools.partial(torch.compile, backend="aot_eager")

def write():
    if "RANK" in os.environ:
        with open(f"counters_{os.environ['RANK']}.json", "w") as file:
            json.dump({name: dict(found) for name, found in counters.items()}, file)

atexit.register(write)
import train
sys.exit(train.main(sys.argv[1:]))
"""


# With activation checkpointing the loss is compiled in the parts that a GPU's is.
@pytest.mark.parametrize(("recompute", "n_graphs"), [("false", 1), ("true", 2)])
def test_two_ranks_compile_once_and_reach_the_same_losses(
    recompute: str,
    n_graphs: int,
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = ("max_steps=4", "micro_batch=2", "callbacks.validation.every_n_steps=2")
    options = [*tiny_run, *steps, "callbacks.samples.every_n_steps=2", "optim=adamw"]
    fit(*options)
    script = tmp_path / "compiled.py"
    script.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(LAUNCHER, "")  # which is set below, and removed after the test
    how = ("compile=true", f"activation_checkpointing={recompute}")
    ranks = ("trainer.devices=2", "trainer.accelerator=cpu")
    assert train.main([*options, *how, *ranks, "name=compiled"]) == 0
    for rank in range(2):
        counters = json.loads((tmp_path / f"counters_{rank}.json").read_text())
        assert counters["stats"]["unique_graphs"] == n_graphs
        assert not counters.get("graph_break")
    columns = ("step", "train/loss", "train/grad_norm", "val/loss")
    alone, compiled = (
        [float(value or 0) for row in metrics(tmp_path / "runs" / name, *columns) for value in row]
        for name in ("tiny", "compiled")
    )
    assert compiled == pytest.approx(alone, rel=1e-5)
