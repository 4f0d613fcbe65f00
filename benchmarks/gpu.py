"""Check and measure everything that needs a GPU, in one command of at most 8 minutes.

    python benchmarks/gpu.py --out gpu [--nanogpt nanoGPT]
    python benchmarks/gpu.py --out gpu --sections correct engine
    python benchmarks/gpu.py --out cpu --device cpu --quick

Sections run in the order below, the most valuable first. Each prints JSON lines, which are appended
to OUT/gpu.jsonl as well: what came before an interruption stands, and a section that fails reports
its error and lets the next one begin. No section starts after `--seconds`. `--quick` has tiny
shapes, with which a CPU runs all of it. Data is the standard library of Python; `train` and
`recipe` need GPT-2's tokenizer (TIKTOKEN_CACHE_DIR on a machine without a network).

    environment  versions, the card, and whether torch.compile can work
    limits       rates of matrix products, memory and attention
    correct      model, optimizers, stages, resuming and engine against references
    eager        a training step of GPT-2 small, not compiled, by parts
    compiled     the same compiled, with a profile of its kernels in OUT/kernels.txt
    train        the whole of train.py: tokens per second beside the bare step, and its start
    peer         nanoGPT's model in the same shape
    larger       GPT-2 medium and XL
    engine       tokens per second of 1, 32 and 128 streams
    recipe       as train, with experiment=gpt2_small_fast
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import engine_programs
import random_models
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt.generation import generate
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import adamw, muon
from nanogpt.training.compiled import training_loss
from nanogpt.training.language_model import next_token_loss
from nanogpt.training.machine import device_name, versions
from nanogpt.training.throughput import flops_per_token, peak_flops

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]
TINY: Record = {"block_size": 64, "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 64}
PADDED = 50_304  # GPT-2's vocabulary as nanoGPT pads it
FP32, BF16 = 1e-4, 3e-2  # relative errors that rounding explains


class Options(argparse.Namespace):
    """Options, and the shapes that follow from them."""

    device: str
    quick: bool
    out: Path
    nanogpt: Path | None

    def model(self, preset: str, **keys: Any) -> GPTConfig:
        return GPTConfig(**TINY) if self.quick else GPTConfig.preset(preset, **keys)

    def rows(self, n: int) -> int:
        return 2 if self.quick else n


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    began, failed = time.perf_counter(), 0
    for name, section in SECTIONS.items():
        if options.sections and name not in options.sections:
            continue
        if time.perf_counter() - began > options.seconds:
            emit(options, {"section": name, "skipped": f"after {options.seconds:g} s"})
            continue
        section_began = time.perf_counter()
        try:
            for record in section(options):
                failed += record.get("ok") is False
                emit(options, {"section": name, **record})
        except Exception:
            failed += 1
            emit(options, {"section": name, "ok": False, "error": traceback.format_exc()})
        emit(options, {"section": name, "seconds": time.perf_counter() - section_began})
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return 1 if failed else 0


def emit(options: Options, record: Record) -> None:
    line = json.dumps(record)
    print(line.replace("\\n", "\n") if "error" in record else line, flush=True)
    with open(options.out / "gpu.jsonl", "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def environment(options: Options) -> Iterator[Record]:
    """Yield versions, the card, and whether torch.compile works."""
    device = torch.device(options.device)
    record: Record = {"device": device_name(device), **versions()}
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": torch.cuda.get_device_capability(device),
            "memory_gib": properties.total_memory / 2**30,
        }
    yield record
    torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    yield {"what": "torch.compile", "ok": True}


def limits(options: Options) -> Iterator[Record]:
    """Yield FLOP/s of products, bytes/s of copies, and seconds of attention by backend."""
    side = 512 if options.quick else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=options.device, dtype=dtype)
        seconds = timed(options, partial(torch.mm, a, a))
        yield {"what": f"product {dtype}", "flops_per_s": 2 * side**3 / seconds}
    source = torch.empty(side * side * 4, device=options.device)
    target = torch.empty_like(source)
    seconds = timed(options, lambda: target.copy_(source))
    yield {"what": "copy", "bytes_per_s": 2 * source.nbytes / seconds}
    config = options.model("gpt2")
    shape = (options.rows(64), config.n_head, config.block_size, config.n_embd // config.n_head)
    q, k, v = (
        torch.randn(shape, device=options.device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    yield {"what": "attention default", "s": timed(options, attend)}
    if options.device == "cuda":
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                yield {"what": f"attention {backend.name}", "s": timed(options, attend)}


def correct(options: Options) -> Iterator[Record]:
    """Yield whether each part agrees with its reference, with the largest relative error."""
    torch.manual_seed(0)
    config = GPTConfig(**{**TINY, "n_embd": 128})
    model, ids = GPT(config), torch.randint(512, (4, 64))
    expected = gradients(model, ids, next_token_loss)
    moved = GPT(config)
    moved.load_state_dict(model.state_dict())
    moved.to(options.device)
    found = gradients(moved, ids.to(options.device), next_token_loss)
    yield agreement("fp32 as on the CPU", expected, found, FP32)
    with torch.autocast(options.device, torch.bfloat16):
        found = gradients(moved, ids.to(options.device), next_token_loss)
    yield agreement("bf16 near fp32", expected, found, BF16)
    found = gradients(moved, ids.to(options.device), training_loss(next_token_loss, True))
    yield agreement("compiled as eager", expected, found, FP32)
    yield optimizer_agreement(options, config)
    with tempfile.TemporaryDirectory() as folder:
        yield from stages(options, Path(folder))
        yield engine_agreement(options, Path(folder))


def gradients(model: GPT, ids: torch.Tensor, loss: Callable[..., Any]) -> list[torch.Tensor]:
    """Return the loss and all gradients of the model, in fp32 on the CPU."""
    model.zero_grad()
    value = loss(model, ids, ids)
    value.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [tensor.detach().float().cpu() for tensor in (value, *grads)]


def agreement(what: str, expected: Any, found: Any, tolerance: float) -> Record:
    errors = [
        float((a - b).norm() / a.norm().clamp(min=1e-12))
        for a, b in zip(expected, found, strict=True)
    ]
    return {"what": what, "ok": max(errors) <= tolerance, "error_norm": max(errors)}


def optimizer_agreement(options: Options, config: GPTConfig) -> Record:
    """Compare three steps of Muon with torch.optim.Muon's on the matrices."""
    torch.manual_seed(0)
    ours = GPT(config).to(options.device)
    theirs = GPT(config).to(options.device)
    theirs.load_state_dict(ours.state_dict())
    names = [n for n, p in ours.named_parameters() if ".h." in f".{n}" and p.ndim == 2]
    optimizers = (
        muon(ours, learning_rate=0.01, adamw_learning_rate=0.0, weight_decay=0.1, momentum=0.9),
        torch.optim.Muon(
            [dict(theirs.named_parameters())[name] for name in names],
            lr=0.01,
            weight_decay=0.1,
            momentum=0.9,
            adjust_lr_fn="match_rms_adamw",
        ),
    )
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            for name in names:
                parameter = dict(model.named_parameters())[name]
                parameter.grad = torch.randn(parameter.shape).to(options.device)
            optimizer.step()
    ours_now, theirs_now = (
        [dict(model.named_parameters())[name].detach() for name in names]
        for model in (ours, theirs)
    )
    return agreement("Muon as torch.optim.Muon", theirs_now, ours_now, BF16)


def stages(options: Options, folder: Path) -> Iterator[Record]:
    """Run the stages through train.py, and resume one of them."""
    texts = [f"text {i} is {'spam' if i % 3 else 'ham'}" for i in range(64)]
    lines = (json.dumps({"text": t, "label": t.split()[-1]}) for t in texts)
    (folder / "labelled.jsonl").write_text("\n".join(lines))
    lines = (json.dumps({"instruction": t, "output": t.upper()}) for t in texts)
    (folder / "instructions.jsonl").write_text("\n".join(lines))
    small = ["model.n_layer=2", "model.n_embd=64", "model.n_head=2", "max_steps=20"]
    small += ["callbacks.checkpoint.every_n_steps=5", "callbacks.validation.every_n_steps=10"]
    small += ["callbacks.validation.final_tokens=8192"]
    whole = [*small, "trainer.deterministic=true", "compile=false", "tokenizer=byte"]
    runs = {
        "pretrain": [*whole, "stage=quickstart"],
        "pretrain in fp16": [*whole, "stage=quickstart", "trainer.precision=16-mixed"],
        "instruct": [
            *(*small, "stage=instruct", "data=instructions", "init_from=pretrain"),
            f"data.path={folder / 'instructions.jsonl'}",
        ],
        "classify": [
            *(*small, "stage=classify", "data=labelled", "tokenizer=byte"),
            f"data.path={folder / 'labelled.jsonl'}",
        ],
    }
    if options.device == "cpu":
        del runs["pretrain in fp16"]
    for name, words in runs.items():
        done = train(options, folder, [*words, f"name={name.replace(' ', '-')}"])
        yield {"what": f"stage {name}", "ok": done.returncode == 0, **tail(done)}
    process = start(options, folder, [*runs["pretrain"], "name=resumed"])
    checkpoints = folder / "runs" / "resumed" / "checkpoints"
    while process.poll() is None and not (checkpoints / "step_000010.ckpt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = train(options, folder, [*runs["pretrain"], "name=resumed"])
    names = ("pretrain", "resumed")
    digests = {summary(folder, name).get("weights_sha256") for name in names}
    yield {"what": "resumed to the same bits", "ok": len(digests) == 1, **tail(done)}


def engine_agreement(options: Options, folder: Path) -> Record:
    """Compare texts that the engine continues alone and in company with `generate`."""
    config = GPTConfig(**{**TINY, "vocab_size": 50_257})
    model = random_models.write_random(folder / "model.ckpt", config, noise=0.05)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(50_257, (24, 8), generator=generator).tolist()
    program = engine_programs.Ours(folder, "fp32", device=options.device)
    company = program.continue_texts(prompts, 16)
    alone = [program.continue_texts([prompt], 16)[0] for prompt in prompts]
    model = model.to(options.device)
    expected = [[*generate(model, p, max_new_tokens=16, temperature=0)] for p in prompts]
    is_same = company == alone
    differ = sum(a != b for a, b in zip(alone, expected, strict=True))
    return {
        "what": "engine alone as in company, and as generate",
        "ok": is_same and not differ,
        "alone_as_in_company": is_same,
        "texts_unlike_generate": differ,
    }


def eager(options: Options) -> Iterator[Record]:
    """Yield seconds of a training step that is not compiled, and of its optimizers."""
    config = options.model("gpt2", vocab_size=PADDED)
    yield step_record(options, "AdamW", config, options.rows(16), next_token_loss)
    for name, make in (("AdamW", adamw), ("Muon", muon)):
        model = GPT(config).to(options.device)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = make(model)
        yield {"what": f"{name} alone", "s": timed(options, optimizer.step)}
    parameters = [*model.parameters()]
    clip = timed(options, lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    yield {"what": "clipping alone", "s": clip}


def compiled(options: Options) -> Iterator[Record]:
    """Yield the same compiled; write a profile of three steps."""
    rows = options.rows(64)
    for name in ("gpt2", "modern_small"):
        config = options.model("gpt2", vocab_size=PADDED)
        if name == "modern_small" and not options.quick:
            config = modern_small()
        profile = options.out / "kernels.txt" if name == "gpt2" else None
        yield step_record(
            options, name, config, rows, training_loss(next_token_loss, True), profile=profile
        )


def modern_small() -> GPTConfig:
    shape = argparse.Namespace(model="modern_small", set=[f"vocab_size={PADDED}"])
    return random_models.shape(argparse.ArgumentParser(), shape)


def step_record(
    options: Options,
    what: str,
    config: GPTConfig,
    rows: int,
    loss: Callable[..., Any],
    profile: Path | None = None,
) -> Record:
    """Return what whole steps of a model take in bf16-mixed; halve the rows that do not fit."""
    while True:
        try:
            torch.manual_seed(0)
            with torch.device(options.device):
                model = GPT(config).train()
                ids = torch.randint(config.vocab_size, (rows, config.block_size))
            return {"what": what, **measure(options, config, model, ids, loss, profile)}
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
            torch.cuda.empty_cache()


def measure(
    options: Options, config: GPTConfig, model: Any, ids: Any, loss: Any, profile: Path | None
) -> Record:
    optimizer = adamw(model)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            value = loss(model, ids, ids) / ids.numel()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    began = time.perf_counter()
    step()
    synchronize(options)
    first_s = time.perf_counter() - began
    step_s = timed(options, step, budget_s=0.5 if options.quick else 6.0)
    record = {
        "rows": len(ids),
        "first_step_s": first_s,
        "step_s": step_s,
        "tokens_per_s": ids.numel() / step_s,
    }
    if options.device == "cuda":
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        peak, _ = peak_flops(torch.device("cuda"), torch.bfloat16, 0.0)
        record["mfu"] = record["tokens_per_s"] * flops_per_token(config) / peak if peak else None
    if profile is not None:
        with torch.profiler.profile() as profiler:
            for _ in range(3):
                step()
            synchronize(options)
        key = f"self_{options.device}_time_total"
        profile.write_text(profiler.key_averages().table(sort_by=key, row_limit=25))
    return record


def train_section(options: Options) -> Iterator[Record]:
    """Yield what train.py reaches with logging, validation and checkpoints."""
    yield trained(options, "train", "stage=pretrain")


def recipe(options: Options) -> Iterator[Record]:
    """Yield the same of the recipe for models of GPT-2 small's size."""
    yield trained(options, "recipe", "experiment=gpt2_small_fast")


def trained(options: Options, name: str, chosen: str) -> Record:
    words = [chosen, f"name={name}", "data=python_stdlib", "tokenizer=gpt2", "compile=true"]
    words += ["micro_batch=64", "tokens_per_step=524288", "max_steps=40"]
    words += ["callbacks.checkpoint.every_n_steps=20", "callbacks.validation.tokens=131072"]
    words += ["callbacks.validation.every_n_steps=20", "callbacks.samples.every_n_steps=20"]
    words += ["callbacks.validation.final_tokens=131072"]
    if options.quick:
        words = [chosen, f"name={name}", "data=python_stdlib", "tokenizer=byte", "compile=false"]
        words += ["model.n_layer=1", "model.n_embd=64", "model.n_head=2", "model.block_size=64"]
        words += ["max_steps=20", "tokens_per_step=1024", "callbacks.validation.tokens=4096"]
        words += ["callbacks.validation.final_tokens=4096"]
    began = time.perf_counter()
    done = train(options, options.out, [*words, "overwrite=true", "resume=false"])
    found = summary(options.out, name)
    keys = ("tokens_per_s", "mfu", "train_s", "wall_s", "val_loss")
    return {
        "what": f"train.py {chosen}",
        "ok": done.returncode == 0,
        "whole_s": time.perf_counter() - began,
        **{key: found.get(key) for key in keys},
        **tail(done),
    }


def peer(options: Options) -> Iterator[Record]:
    """Yield what nanoGPT's model reaches, compiled, with its own optimizer."""
    if options.nanogpt is None:
        yield {"skipped": "pass --nanogpt, a checkout of github.com/karpathy/nanoGPT"}
        return
    spec: Any = importlib.util.spec_from_file_location("peer", options.nanogpt / "model.py")
    reference = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    config = options.model("gpt2", vocab_size=PADDED)
    fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    shape = {name: getattr(config, name) for name in fields}
    with contextlib.redirect_stdout(None):
        model = reference.GPT(reference.GPTConfig(**shape, dropout=0.0, bias=True))
        model.to(options.device)
    called = model if options.quick else torch.compile(model)
    ids = torch.randint(config.vocab_size, (options.rows(64), config.block_size))

    def loss(_: Any, input_ids: Any, targets: Any) -> Any:
        return called(input_ids, targets)[1] * targets.numel()

    yield {
        "what": "nanoGPT",
        **measure(options, config, model, ids.to(options.device), loss, None),
    }


def larger(options: Options) -> Iterator[Record]:
    """Yield the same of larger models, compiled by block."""
    for preset, rows in (("gpt2-medium", 32), ("gpt2-xl", 8)):
        config = options.model(preset, vocab_size=PADDED)
        yield step_record(
            options, preset, config, options.rows(rows), training_loss(next_token_loss, True)
        )


def engine(options: Options) -> Iterator[Record]:
    """Yield tokens per second of the engine's runner, greedy and sampled."""
    config = options.model("gpt2")
    config = GPTConfig(**{**vars(config), "vocab_size": 50_257})
    n_new = 8 if options.quick else 128
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_random(Path(folder) / "model.ckpt", config)
        for dtype in ("bf16", "fp32"):
            program = engine_programs.Ours(Path(folder), dtype, device=options.device)
            for streams in (1, 4) if options.quick else (1, 32, 128):
                prompts = torch.randint(50_257, (streams, 32)).tolist()
                program.run(prompts, n_new)  # which captures and compiles
                seconds, first_s = program.run(prompts, n_new)
                yield {
                    "what": f"{dtype}, {streams} streams",
                    "tokens_per_s": streams * n_new / seconds,
                    "first_token_s": first_s,
                }


SECTIONS: dict[str, Callable[[Options], Iterator[Record]]] = {
    "environment": environment,
    "limits": limits,
    "correct": correct,
    "eager": eager,
    "compiled": compiled,
    "train": train_section,
    "peer": peer,
    "larger": larger,
    "engine": engine,
    "recipe": recipe,
}


def timed(options: Options, work: Callable[[], object], budget_s: float = 0.5) -> float:
    """Return the mean seconds of an operation that is repeated for about `budget_s`."""
    for _ in range(2):
        work()
    synchronize(options)
    began, n_done = time.perf_counter(), 0
    while n_done < 3 or time.perf_counter() - began < budget_s:
        work()
        n_done += 1
        if n_done % 4 == 0:
            synchronize(options)
    synchronize(options)
    return (time.perf_counter() - began) / n_done


def synchronize(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def start(options: Options, folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """Start train.py on the device, with runs and data in a folder."""
    where = [f"runs_dir={folder / 'runs'}", f"data_dir={options.out / 'data'}"]
    command = [sys.executable, str(ROOT / "train.py"), *words, *where]
    command += [f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(options: Options, folder: Path, words: list[str]) -> Any:
    process = start(options, folder, words)
    try:
        output, _ = process.communicate(timeout=options.seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def tail(done: Any) -> Record:
    """Return the end of a failed command's output."""
    return {"error": done.stdout[-3000:]} if done.returncode else {}


def summary(folder: Path, name: str) -> Record:
    path = folder / "runs" / name / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def parse() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--seconds", type=float, default=480.0, help="default %(default)s")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    options = parser.parse_args(namespace=Options())
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; pass --device cpu --quick to try the script")
    shutil.rmtree(options.out / "runs", ignore_errors=True)  # of an earlier call
    return options


if __name__ == "__main__":
    sys.exit(main())
