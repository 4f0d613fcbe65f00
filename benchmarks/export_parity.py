"""Whether exported models compute elsewhere what they compute here.

    python benchmarks/export_parity.py [--size gpt2|gpt2-xl|qwen3_small|...] [--set KEY=VALUE ...]

Random weights of a published size, or of a file of conf/model, are written as a checkpoint and
exported by the command. Then, one after the other, this project, transformers and (where the
packages gguf and llama_cpp are installed) llama.cpp read 64 tokens, continue them greedily by 64,
and encode awkward texts. Prints the largest difference between logits, how many tokens are
continued equally (and, where they part, how far below our best logit theirs is: random weights
leave near ties), and whether texts get the same ids. Works in a temporary directory (TMPDIR): three
times the weights in float32.
"""

import argparse
import gc
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_models
import torch
from torch import Tensor

from nanogpt.checkpoint import load_checkpoint
from nanogpt.export import main as export
from nanogpt.generation import generate

NOISE = 0.02  # added to every tensor, biases and norms too
TEXTS = (
    "Hello world\r\n\r\n  'tis 12345 don't",
    "naïve 😀👩‍👩‍👧 \u3000\t x\u0085y",
    "a<|endoftext|>b",
)


@dataclass
class Answer:
    """What a program makes of the prompt and the texts."""

    logits: Tensor  # (T, V) of the prompt; ours also of what continues it
    continued: list[int]
    encoded: list[list[int]]


Run = Callable[[Path, list[int], int], Answer]


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    config, generator = random_models.shape(parser, options), torch.Generator().manual_seed(1)
    prompt = torch.randint(config.vocab_size, (64,), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        random_models.write_random(directory / "model.ckpt", config, NOISE)
        ours = ask_us(directory / "model.ckpt", prompt, options.tokens)
        for title, arguments, run in rivals():
            out = directory / "out"
            if export([str(directory / "model.ckpt"), str(out), "--overwrite", *arguments]):
                return 1
            report(f"{options.model}, {title}", ours, run(out, prompt, options.tokens))
            gc.collect()
    return 0


def rivals() -> list[tuple[str, list[str], Run]]:
    """Return the name of each program, the options of its export, and the function that runs it."""
    there: list[tuple[str, list[str], Run]] = [
        ("transformers", ["--format", "hf"], ask_transformers)
    ]
    if importlib.util.find_spec("gguf") and importlib.util.find_spec("llama_cpp"):
        gguf = ["--format", "gguf", "--dtype"]
        there += [(f"llama.cpp {d}", [*gguf, d], ask_llama_cpp) for d in ("f32", "f16")]
    return there


def report(title: str, ours: Answer, theirs: Answer) -> None:
    n_prompt, n_tokens = len(theirs.logits), len(ours.continued)
    difference = (ours.logits[:n_prompt] - theirs.logits).abs().max().item()
    pairs = zip(ours.continued, theirs.continued, strict=True)
    n_equal = next((i for i, (a, b) in enumerate(pairs) if a != b), n_tokens)
    parting = ""
    if n_equal < n_tokens:
        row = ours.logits[n_prompt - 1 + n_equal]
        parting = f" (then one {row.max() - row[theirs.continued[n_equal]]:.1e} below our best)"
    encoding = "equal" if ours.encoded == theirs.encoded else "DIFFERENT"
    print(
        f"{title}: max |difference of logits| {difference:.1e} of deviation "
        f"{ours.logits.std():.2f}, {n_equal} of {n_tokens} greedy tokens ({len({*ours.continued})} "
        f"different ones) equal{parting}, encoding {encoding}"
    )


@torch.inference_mode()
def ask_us(path: Path, prompt: list[int], n_tokens: int) -> Answer:
    checkpoint = load_checkpoint(path)
    steps = generate(checkpoint.model, prompt, max_new_tokens=n_tokens, temperature=0)
    continued = list(itertools.islice(steps, n_tokens))
    logits = checkpoint.model(torch.tensor([prompt + continued]))[0].clone()
    return Answer(logits, continued, [checkpoint.tokenizer.encode(text) for text in TEXTS])


@torch.inference_mode()
def ask_transformers(directory: Path, prompt: list[int], n_tokens: int) -> Answer:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    model.generation_config.eos_token_id = None  # not to end early
    ids = torch.tensor([prompt])
    continued = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False
    )[0, len(prompt) :]
    encoded = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    return Answer(model(ids).logits[0].clone(), continued.tolist(), encoded)


def ask_llama_cpp(path: Path, prompt: list[int], n_tokens: int) -> Answer:
    from llama_cpp import GGML_TYPE_F32, Llama

    model = Llama(
        str(path),
        n_ctx=len(prompt) + n_tokens,
        logits_all=True,
        type_k=GGML_TYPE_F32,  # of the KV cache, else f16
        type_v=GGML_TYPE_F32,
        n_threads=torch.get_num_threads(),
        verbose=False,
    )
    model.eval(prompt)
    logits = torch.tensor(model.scores[: len(prompt)])
    continued: list[int] = []
    while len(continued) < n_tokens:
        continued.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(continued[-1:])
    encoded = [model.tokenize(text.encode(), add_bos=True, special=False) for text in TEXTS]
    model.close()
    return Answer(logits, continued, encoded)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare exported models with transformers and llama.cpp."
    )
    random_models.add_options(parser, "--size")
    parser.add_argument("--tokens", type=int, default=64, help="to continue greedily (default 64)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
