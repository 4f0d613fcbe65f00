"""Write a checkpoint for others: a Hugging Face directory, or a GGUF file for llama.cpp.

    python -m nanogpt.export CHECKPOINT OUT --format hf
    python -m nanogpt.export CHECKPOINT OUT.gguf --format gguf --dtype f16

CHECKPOINT is a .ckpt, a run directory, or the name of a run under runs/.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from nanogpt.checkpoint import Checkpoint, load_checkpoint
from nanogpt.command import add_shared, guard_output, parse, run_command
from nanogpt.gguf_file import write_gguf
from nanogpt.model import NORM_EPSILON, GPTConfig
from nanogpt.pretrained import CONFIG, SAFETENSORS, published_weights
from nanogpt.prompts import find_template
from nanogpt.support import unsupported
from nanogpt.tokenizer_files import padding_id, write_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    guard_output()
    options = parse(parser(), arguments)
    if options.format == "hf" and options.dtype != "f32":
        parser().error("--dtype goes with --format gguf; a Hugging Face directory is in f32")
    return run_command("nanogpt.export", partial(write, options), also=(SafetensorError,))


def write(options: argparse.Namespace) -> None:
    """Write the checkpoint in the format of the options; an export that fails leaves nothing."""
    with exporting(options.out, options.overwrite) as temporary:
        checkpoint = load_checkpoint(options.checkpoint, runs_dir=options.runs_dir)
        check_exportable(checkpoint, options.format)
        if options.format == "hf":
            write_huggingface(checkpoint, temporary)
        else:
            write_gguf(checkpoint, temporary, options.dtype)
    print(f"{checkpoint.path}: {checkpoint.model.num_parameters():,} parameters to {options.out}")


def check_exportable(checkpoint: Checkpoint, format_: str) -> None:
    """Raise ValueError where the model is no GPT-2, or is a classifier and the format is gguf."""
    config, path = checkpoint.config, checkpoint.path
    if checkpoint.labels is not None and format_ == "gguf":
        raise ValueError(f"{path} is a classifier, which GGUF has no place for; pass --format hf")
    if found := unsupported(config, {}):  # the defaults are GPT-2; missing biases become zero
        values = ", ".join(f"{key}={value}" for key, value in found.items())
        switches = " ".join(f"model.{key}={_typed(getattr(type(config)(), key))}" for key in found)
        raise ValueError(
            f"{path} has {values}, which the published GPT-2 and so its formats lack; "
            f"export a model trained with {switches}, as model=gpt2_small has them"
        )


def write_huggingface(checkpoint: Checkpoint, directory: Path) -> None:
    """Make a directory that AutoTokenizer and a class of transformers load with no code of ours.

    It is AutoModelForCausalLM, or AutoModelForSequenceClassification for a classifier.
    """
    directory.mkdir()
    if checkpoint.labels is None:
        _write_language_model(checkpoint, directory)
    else:
        _write_classifier(checkpoint, checkpoint.labels, directory)
    weights = published_weights(checkpoint.model)
    save_file(weights, directory / SAFETENSORS, metadata={"format": "pt"})
    # safetensors makes its file readable by its owner alone, whatever the umask.
    (directory / SAFETENSORS).chmod((directory / "config.json").stat().st_mode)


@contextmanager
def exporting(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path that becomes `out` when the block ends, and goes when it raises.

    Raises FileExistsError where `out` exists, unless it is an export and may be overwritten, and
    NotADirectoryError where it lies under a file.
    """
    if out.exists():
        if not _is_export(out):
            raise FileExistsError(f"{out} exists and is no export; pass another path")
        if not overwrite:
            raise FileExistsError(f"{out} exists; pass another path, or --overwrite")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{out} lies under a file; pass another path") from error
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        _remove(temporary)
        yield temporary
        _remove(out)
        os.replace(temporary, out)
    finally:
        _remove(temporary)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt.export",
        description="Write a checkpoint for others: a Hugging Face directory, or a GGUF file.",
    )
    add_shared(parser, "checkpoint", "--runs-dir")
    parser.add_argument("out", type=Path, help="the directory or file to write")
    parser.add_argument("--format", required=True, choices=("hf", "gguf"))
    parser.add_argument(
        "--dtype",
        default="f32",
        choices=("f32", "f16"),
        help="of the matrices in a GGUF file (default f32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    return parser


def _write_language_model(checkpoint: Checkpoint, directory: Path) -> None:
    """Write all but the weights of a language model.

    Generation ends with `<|endoftext|>`, or with the template's end of a reply.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    jinja: str | None = None
    ends: int | list[int] = tokenizer.eot_id
    if checkpoint.template is not None:
        template = find_template(checkpoint.template)
        jinja, ends = template.jinja(), template.stop_ids(tokenizer)
    write_tokenizer(tokenizer, directory, config.block_size, jinja)
    ids = dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eot_id)
    ids["bos_token_id"] = tokenizer.encode_prompt("")[0]  # of an empty prompt, there and here
    about = {"architectures": ["GPT2LMHeadModel"], **ids}
    _write_json(directory / CONFIG, {**_published_config(config), **about})
    _write_json(directory / "generation_config.json", {**ids, "eos_token_id": ends})


def _write_classifier(checkpoint: Checkpoint, labels: list[str], directory: Path) -> None:
    """Write all but the weights of a classifier."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    write_tokenizer(tokenizer, directory, config.block_size, framed=True)
    about = {
        "architectures": ["GPT2ForSequenceClassification"],
        "problem_type": "single_label_classification",
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot_id),
        "pad_token_id": padding_id(tokenizer),
    }
    _write_json(directory / CONFIG, {**_published_config(config), **about})


def _typed(value: object) -> str:
    return json.dumps(value).strip('"')


def _is_export(path: Path) -> bool:
    if path.is_dir():
        return (path / CONFIG).is_file()
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _published_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": NORM_EPSILON,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
