"""A block of another package (`model.block`): built, trained, recorded, loaded, run and refused."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from nanogpt.checkpoint import (
    KEY,
    Checkpoint,
    init_model,
    load_checkpoint,
    read_checkpoint,
    record,
    with_config,
    with_special_tokens,
    write_checkpoint,
)
from nanogpt.classifier import Classifier
from nanogpt.evaluate import main as evaluate_main
from nanogpt.evaluation.scoring import Request, loglikelihoods
from nanogpt.export import check_exportable
from nanogpt.generate import main as generate_main
from nanogpt.generation import generate
from nanogpt.model import GPT, Block, GPTConfig
from nanogpt.support import mixes_by_attend
from nanogpt.tokenizer import byte_tokenizer
from nanogpt.training.throughput import flops_per_token
from nanogpt.values import explain
from serving.engine.forward import Span
from serving.engine.messages import Settings, Stats
from serving.engine.native import make_forward
from serving.engine.registry import Registry
from serving.engine.runner import load_runner
from tests.engine_models import InlineEngine
from tests.engine_models import generate as to_generate

SOURCE = """
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F
from nanogpt.model import Block, rotate

Path(__file__).with_suffix(".imported").touch()

class SwiGLU(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gate, self.up = nn.Linear(n, 2 * n, bias=False), nn.Linear(n, 2 * n, bias=False)
        self.c_proj = nn.Linear(2 * n, n)

    def forward(self, x):
        return self.c_proj(F.silu(self.gate(x)) * self.up(x))

class SwiGLUBlock(Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.mlp = SwiGLU(config.n_embd)

class OneHead(nn.Module):
    def __init__(self, n, layer):
        super().__init__()
        self.layer, self.qkv, self.c_proj = layer, nn.Linear(n, 3 * n), nn.Linear(n, n)

    def forward(self, x, rotation, attend):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(-3)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.c_proj(attend(self.layer, q, k, v).flatten(2))

class OwnAttention(Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.attn = OneHead(config.n_embd, layer)

class Parallel(SwiGLUBlock):
    def forward(self, x, rotation, attend):
        return x + self.attn(self.ln_1(x), rotation, attend) + self.mlp(self.ln_2(x))

class Shifted(SwiGLUBlock):  # reads the token before past the attention
    def forward(self, x, rotation, attend):
        return super().forward(x + F.pad(x, (0, 0, 1, 0))[:, :-1], rotation, attend)

class Counted(SwiGLUBlock):  # has positions of its own
    def forward(self, x, rotation, attend):
        return super().forward(x + torch.arange(x.size(1))[:, None], rotation, attend)

class Twice(SwiGLUBlock):
    def forward(self, x, rotation, attend):
        return super().forward(x, rotation, attend) + self.attn(x, rotation, attend)

class Mean(nn.Module):  # of the tokens so far, without attention
    def __init__(self, config, layer):
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.n_embd,), 0.5))
        self.linear = nn.Linear(config.n_embd, config.n_embd)
        counts = torch.arange(1.0, config.block_size + 1)[:, None]
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, x, rotation, attend):
        return x + self.scale * self.linear(x.cumsum(1) / self.counts[: x.size(1)])

class Plain(Mean):
    pass

class Narrow(nn.Module):
    def __init__(self, config, layer):
        super().__init__()

    def forward(self, x):
        return x

class Lonely(nn.Module):
    def forward(self, *args):
        return args[0]

class NoModule:
    pass

def function(config, layer):
    return Block(config, layer)
"""
ROOT = Path(__file__).parent.parent
CONFIG = GPTConfig(block_size=16, vocab_size=273, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the folder of the package `other`, which leaves a file there when it is imported."""
    folder = tmp_path / "packages"
    (folder / "other").mkdir(parents=True)
    (folder / "other" / "__init__.py").write_text("")
    (folder / "other" / "blocks.py").write_text(SOURCE)
    (folder / "broken.py").write_text("raise KeyError('GPU')\n")
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("other", "broken")]:
        del sys.modules[name]


def build(name: str, **changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(CONFIG, block=f"other.blocks.{name}", **changes)).eval()


def save(model: GPT, path: Path, **about: Any) -> Path:
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"global_step": 1, "state_dict": weights}
    tokenizer = byte_tokenizer()
    write_checkpoint({**content, KEY: record("pretrain", model.config, tokenizer, **about)}, path)
    return path


def forget(package: Path) -> None:
    """Make the package one that this process has not imported."""
    (package / "other" / "blocks.imported").unlink()
    for name in [name for name in sys.modules if name.partition(".")[0] == "other"]:
        del sys.modules[name]


def some_ids(*shape: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def test_the_named_class_makes_every_block(package: Path) -> None:
    model = build("SwiGLUBlock")
    assert [type(block).__name__ for block in model.h] == ["SwiGLUBlock"] * 2
    assert [block.layer for block in model.h] == [0, 1]
    assert "h.1.mlp.gate.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("other.blocks.Missing", r"\(AttributeError: .*'Missing'"),
        ("other.absent.Block", r"\(ModuleNotFoundError"),
        ("broken.Block", r"\(KeyError: 'GPU'\)"),
        ("other.blocks.NoModule", "is not a subclass of torch.nn.Module"),
        ("other.blocks.function", "is not a subclass of torch.nn.Module"),
        ("os.system", "is not a subclass of torch.nn.Module"),
        ("other.blocks.Narrow", r"TypeError: too many .*called with \(x, rotation, attend\)"),
        ("other.blocks.Lonely", r"TypeError: .*constructed with \(config, layer\)"),
        ("torch.nn.ReLU", r"called with \(x, rotation, attend\)"),
    ],
)
def test_a_class_that_is_no_block_is_refused(package: Path, block: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^model.block={block} .*{message}") as caught:
        GPT(replace(CONFIG, block=block))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "block", ["Block", "", "os.system('x')", ".x", "a..b", 3, ["a.B"], "a.b-c"]
)
def test_a_path_that_names_no_class_is_refused(block: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        replace(CONFIG, block=block)
    assert re.match(r"block(=.*(the dotted path of a class|text)| is empty)", explain(caught.value))


def test_linear_layers_are_drawn_and_other_parameters_stay_as_constructed(package: Path) -> None:
    swiglu = dict(build("SwiGLUBlock", n_layer=8, n_embd=128).named_parameters())
    assert swiglu["h.7.mlp.gate.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert swiglu["h.7.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert swiglu["h.7.mlp.c_proj.bias"].eq(0).all()
    assert swiglu["h.7.ln_1.weight"].eq(1).all()
    assert swiglu["wte.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    mean = dict(build("Mean").named_parameters())
    assert mean["h.0.scale"].eq(0.5).all()
    assert mean["h.0.linear.bias"].eq(0).all()
    assert mean["ln_f.weight"].eq(1).all()


def test_a_record_names_the_class_and_omits_the_key_without_one() -> None:
    assert "block" not in record("pretrain", CONFIG, byte_tokenizer())["model"]
    named = record("pretrain", replace(CONFIG, block="a.B"), byte_tokenizer())["model"]
    assert named == {**CONFIG.record(), "block": "a.B"}


def test_a_recorded_null_loads_as_our_block(tmp_path: Path) -> None:
    path = save(GPT(CONFIG), tmp_path / "a.ckpt")
    content = dict(torch.load(path, weights_only=True))
    content[KEY]["model"]["block"] = None
    write_checkpoint(content, path)
    assert type(load_checkpoint(path).model.h[0]) is Block


@pytest.mark.parametrize("allowed", ["other", "other.blocks", "other.blocks.Plain"])
def test_a_checkpoint_loads_where_its_module_is_allowed(
    package: Path, tmp_path: Path, allowed: str
) -> None:
    model, ids = build("Plain"), some_ids(2, 16)
    path = save(model, tmp_path / "a.ckpt")
    state = torch.get_rng_state()
    loaded = load_checkpoint(path, allow_modules=["unknown", allowed])
    assert torch.get_rng_state().equal(state)
    assert loaded.config == model.config
    assert loaded.model(ids).equal(model(ids))  # buffers that no state dict holds included


@pytest.mark.parametrize(
    "allowed",
    [
        [],
        ["othe"],
        ["blocks"],
        ["other.block"],
        ["other.blocks.Plai"],
        ["other.blocks.Plain.x"],
        [""],
    ],
)
def test_a_class_that_is_not_allowed_is_not_imported(
    package: Path, tmp_path: Path, allowed: list[str]
) -> None:
    path = save(build("Plain"), tmp_path / "a.ckpt")
    forget(package)
    with pytest.raises(
        ValueError, match=r"model\.block=other\.blocks\.Plain.*--allow-module other "
    ):
        load_checkpoint(path, allow_modules=allowed)
    assert read_checkpoint(path)[KEY]["model"]["block"] == "other.blocks.Plain"
    assert not (package / "other" / "blocks.imported").exists()


@pytest.mark.parametrize(
    "block", ["os.system", "builtins.exec", "subprocess.Popen", "torch.nn.ReLU"]
)
def test_a_checkpoint_names_nothing_else_that_runs(
    package: Path, tmp_path: Path, block: str
) -> None:
    path = save(build("Plain"), tmp_path / "a.ckpt")
    content = dict(torch.load(path, weights_only=True))
    content[KEY]["model"]["block"] = block
    write_checkpoint(content, path)
    with pytest.raises(ValueError, match=f"model.block={block}, a class that is not part"):
        load_checkpoint(path, allow_modules=["other"])
    with pytest.raises(ValueError, match=f"model.block={block} "):
        load_checkpoint(path, allow_modules=[block.partition(".")[0]])


def test_weights_of_another_version_of_the_class_are_refused(package: Path, tmp_path: Path) -> None:
    path = save(build("Plain"), tmp_path / "a.ckpt")
    content = dict(torch.load(path, weights_only=True))
    content[KEY]["model"]["block"] = "other.blocks.SwiGLUBlock"
    write_checkpoint(content, path)
    with pytest.raises(
        ValueError, match=r"do not fit model\.block=other\.blocks\.SwiGLUBlock"
    ) as caught:
        load_checkpoint(path, allow_modules=["other"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_layer", [1, 3, 10**9])
def test_layers_that_the_weights_lack_are_not_built(
    package: Path, tmp_path: Path, n_layer: int
) -> None:
    path = save(build("Plain"), tmp_path / "a.ckpt")
    content = dict(torch.load(path, weights_only=True))
    content[KEY]["model"]["n_layer"] = n_layer
    write_checkpoint(content, path)
    with pytest.raises(ValueError, match=f"has weights of 2 layers and n_layer={n_layer}"):
        load_checkpoint(path, allow_modules=["other"])


def test_a_run_starts_from_such_a_model_with_other_tokens_and_contexts(
    package: Path, tmp_path: Path
) -> None:
    path, ids = save(build("Plain"), tmp_path / "a.ckpt"), some_ids(1, 8)
    start = init_model(path, ["other"])
    changed = with_config(with_special_tokens(start, ["<|user|>"]), block_size=8)
    assert changed.model(ids).equal(start.model(ids))
    classifier = Classifier.from_model(start.model, 3)
    assert classifier.language_model().eval()(ids).equal(start.model(ids))


ATTEND = ["SwiGLUBlock", "OwnAttention", "Parallel"]  # mix tokens by attend alone
MIX = ["Plain", "Shifted", "Counted", "Twice"]  # and in other ways


@pytest.mark.parametrize("name", [*ATTEND, *MIX])
def test_generation_equals_reading_the_whole_context_each_time(package: Path, name: str) -> None:
    model, context, expected = build(name, position="rotary"), some_ids(5).tolist(), []
    for parameter in model.parameters():  # so that what was read before counts
        parameter.data.mul_(20 if parameter.dim() == 2 else 1)
    for _ in range(24):
        context = context[-8:] if len(context) > 16 else context
        context.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        expected.append(context[-1])
    prompt = some_ids(5).tolist()
    assert list(generate(model, prompt, max_new_tokens=24, temperature=0)) == expected


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_cache_goes_to_blocks_that_mix_tokens_by_attend_alone(
    package: Path, position: str
) -> None:
    found = {name: mixes_by_attend(build(name, position=position)) for name in [*ATTEND, *MIX]}
    assert found == {**dict.fromkeys(ATTEND, True), **dict.fromkeys(MIX, False)}
    assert mixes_by_attend(GPT(CONFIG))


@pytest.mark.parametrize("name", ATTEND)
def test_packed_rows_are_read_as_if_each_document_stood_alone(package: Path, name: str) -> None:
    model, ids = build(name), some_ids(1, 16)
    packed = model(ids, documents=torch.tensor([[0] * 5 + [1] * 11]))
    alone = torch.cat([model(part) for part in ids.split([5, 11], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ATTEND)
def test_the_engines_forward_runs_it(package: Path, name: str) -> None:
    model, ids = build(name, n_embd=64), some_ids(16)
    forward = make_forward(deepcopy(model), torch.zeros(2, 2, 2, 2, 16, 32), "fp32")
    states = torch.cat(
        [
            forward.hidden_states([Span(1, 0, ids[:9].tolist()), Span(0, 0, [5])])[:9],
            forward.hidden_states([Span(1, 9, ids[9:].tolist())]),
        ]
    )
    torch.testing.assert_close(forward.logits(states), model(ids[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*ATTEND, *MIX])
def test_scores_are_those_of_the_models_own_forward(package: Path, name: str) -> None:
    model = build(name, block_size=20)  # no multiple of what rows are padded to
    ids = some_ids(4, 20).tolist()
    requests = [
        Request(ids[0][:5], [ids[1][:3], [*ids[1][:2], 7], ids[2][:6]]),
        Request(ids[3][:12], [ids[3][12:16]]),
        Request(ids[2][:18], [ids[0][:8]]),  # longer than the context together
    ]
    for request, answers in zip(requests, loglikelihoods(model, requests), strict=True):
        for continuation, one in zip(request.continuations, answers, strict=True):
            text = [*request.context, *continuation][:-1][-20:]
            logits = model(torch.tensor([text]))[0, -len(continuation) :].log_softmax(-1)
            targets = torch.tensor(continuation)
            expected = logits[range(len(targets)), targets].sum().item()
            assert one.loglikelihood == pytest.approx(expected, rel=1e-5)
            assert one.is_greedy == logits.argmax(-1).equal(targets)


def test_arithmetic_counts_the_blocks_own_weights(package: Path) -> None:
    blocks = sum(p.numel() for p in build("SwiGLUBlock").h.parameters())
    expected = 6 * (blocks + 273 * 16) + 12 * 2 * 16 * 16
    assert flops_per_token(replace(CONFIG, block="other.blocks.SwiGLUBlock")) == expected


def test_it_is_not_exported(package: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(save(build("Plain"), tmp_path / "a.ckpt"), allow_modules=["other"])
    assert isinstance(loaded, Checkpoint)
    with pytest.raises(ValueError, match=r"has block=other\.blocks\.Plain, which gpt2"):
        check_exportable(loaded, "hf")


SWIGLU = "model.block=other.blocks.SwiGLUBlock"


def test_an_interrupted_run_continues_to_the_same_weights(
    package: Path, tiny_run: list[str], tmp_path: Path, main: Callable[..., int]
) -> None:
    assert main(*tiny_run, SWIGLU) == 0
    run = tmp_path / "runs" / "tiny"
    whole = load_checkpoint(run, allow_modules=["other"]).model.state_dict()
    (run / "summary.json").unlink()
    for name in ("step_000012.ckpt", "last.ckpt"):
        (run / "checkpoints" / name).unlink()
    assert main(*tiny_run, SWIGLU) == 0
    loaded = load_checkpoint(run, allow_modules=["other"])
    assert loaded.step == 12
    assert "h.0.mlp.gate.weight" in whole
    assert all(tensor.equal(whole[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_run_starts_from_a_model_whose_class_the_command_names(
    package: Path,
    tiny_run: list[str],
    tmp_path: Path,
    main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(build("SwiGLUBlock"), tmp_path / "a.ckpt")
    words = [word for word in tiny_run if not word.startswith("model")]
    words.append(f"init_from={tmp_path / 'a.ckpt'}")
    assert main(*words, SWIGLU) == 0
    loaded = load_checkpoint("tiny", runs_dir=tmp_path / "runs", allow_modules=["other"])
    assert loaded.config.block == "other.blocks.SwiGLUBlock"
    forget(package)
    capsys.readouterr()
    assert main(*words, "name=second") == 1
    assert f"or {SWIGLU} (train.py)" in capsys.readouterr().err
    assert not (package / "other" / "blocks.imported").exists()


def test_modules_of_the_current_folder_are_found(
    package: Path, tiny_run: list[str], tmp_path: Path
) -> None:
    def run(*command: str) -> str:
        return subprocess.run(
            [sys.executable, *command], cwd=package, check=True, capture_output=True, text=True
        ).stdout

    run(str(ROOT / "train.py"), *tiny_run, SWIGLU, "max_steps=1")
    checkpoint = str(tmp_path / "runs" / "tiny")
    output = run("-m", "nanogpt.generate", checkpoint, "--prompt=def ", "--allow-module=other")
    assert output.startswith("def ")


def test_generate_runs_what_it_is_allowed_to_and_names_the_option_else(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(save(build("Plain"), tmp_path / "a.ckpt")), "--prompt", "def "]
    assert generate_main(arguments) == 1
    assert "with --allow-module other " in capsys.readouterr().err
    assert generate_main([*arguments, "--allow-module", "other"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_evaluate_runs_what_it_is_allowed_to(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("The square of 3 is 9. " * 5)
    arguments = [str(save(build("SwiGLUBlock"), tmp_path / "a.ckpt")), "--task", "perplexity"]
    arguments += ["--data", str(tmp_path / "text.txt")]
    assert evaluate_main(arguments) == 1
    assert "with --allow-module other " in capsys.readouterr().err
    assert evaluate_main([*arguments, "--allow-module", "other"]) == 0


def test_the_server_refuses_it_without_an_import(package: Path, tmp_path: Path) -> None:
    path = save(build("SwiGLUBlock"), tmp_path / "a.ckpt")
    forget(package)
    entry = Registry(str(path)).entries[0]
    with pytest.raises(ValueError, match=r"allow_modules=\[other\] \(serve.py"):
        load_runner(entry, Settings(device="cpu"), Stats(), lambda client, message: None, 1e9)
    assert not (package / "other" / "blocks.imported").exists()


@pytest.mark.parametrize("name", ["SwiGLUBlock", "OwnAttention"])
def test_the_server_runs_what_it_is_allowed_to(name: str, package: Path, tmp_path: Path) -> None:
    model = build(name, n_kv_head=1) if name == "SwiGLUBlock" else build(name)
    (tmp_path / "run").mkdir()
    save(model, tmp_path / "run" / "last.ckpt")
    engine = InlineEngine(tmp_path, allow_modules=("other",))
    prompt = list(b"def ")
    expected = list(generate(model, prompt, max_new_tokens=8, temperature=0))
    assert engine.one(to_generate("a", prompt)).ids == expected


def test_the_server_refuses_a_block_that_mixes_in_another_way(
    package: Path, tmp_path: Path
) -> None:
    entry = Registry(str(save(build("Plain"), tmp_path / "a.ckpt"))).entries[0]
    settings = Settings(device="cpu", allow_modules=("other",))
    with pytest.raises(ValueError, match="mixes tokens in another way than `attend`"):
        load_runner(entry, settings, Stats(), lambda client, message: None, 1e9)
