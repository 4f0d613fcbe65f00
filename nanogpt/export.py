"""Write a checkpoint for others: a Hugging Face directory, or a GGUF file for llama.cpp.

    python -m nanogpt.export CHECKPOINT OUT --format hf
    python -m nanogpt.export CHECKPOINT OUT.gguf --format gguf --dtype f16

CHECKPOINT is a .ckpt, a run directory, or the name of a run under runs/. OUT.Modelfile, next to the
GGUF file, is for Ollama.
"""

import argparse
import importlib
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanogpt.architectures import (
    ARCHITECTURES,
    Architecture,
    biased_weights,
    find_architecture,
    without_embedding_norm,
)
from nanogpt.checkpoint import Checkpoint, load_checkpoint
from nanogpt.command import make_parser, parse, run_command
from nanogpt.disk import write_json
from nanogpt.model import rotary_speeds
from nanogpt.pretrained import CONFIG, SAFETENSORS
from nanogpt.prompts import find_template
from nanogpt.tokenizer import END_OF_TEXT
from nanogpt.tokenizer_files import described, llama_cpp_name, padding_id, write_tokenizer

WITHOUT_CLASSIFIERS = ("apertus", "nanochat")
# The rotation turns channels (2i, 2i + 1) there, and (i, i + D/2) here and in Qwen3.
INTERLEAVED = ("llama", "arcee")
LLAMA_CPP_LACKS = {"arcee": "bias", "qwen3": "rope_scaling", "nanochat": "embd_norm"}
# The squared ReLU as an xIELU (arXiv 2411.13010), of whose alphas llama.cpp takes the softplus.
SQUARED_RELU = {"alpha_p": math.log(math.expm1(1)), "alpha_n": -1e3, "beta": 0.0, "eps": -1e-6}
QUERY_KEY = re.compile(r"\.(q|k)_proj\.")
NO_MERGES = [f"{END_OF_TEXT} {END_OF_TEXT}"]  # occurs in no text; the list may not be empty


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse(parser(), arguments)
    if options.format == "hf" and options.dtype != "f32":
        parser().error("--dtype goes with --format gguf; a Hugging Face directory is in f32")
    return run_command("nanogpt.export", partial(write, options), also=(SafetensorError,))


def write(options: argparse.Namespace) -> None:
    """Write the checkpoint in the format of the options; an export that fails leaves nothing."""
    with exporting(options.out, options.overwrite) as temporary:
        checkpoint = load_checkpoint(options.checkpoint, runs_dir=options.runs_dir)
        is_free = options.format == "gguf" and options.architecture != "nanochat"
        if is_free and checkpoint.config.embd_norm and checkpoint.config.position == "rotary":
            model = without_embedding_norm(checkpoint.model)  # which llama.cpp lacks
            checkpoint = replace(checkpoint, model=model, config=model.config)
        architecture = check_exportable(checkpoint, options.format, options.architecture)
        if options.format == "hf":
            write_huggingface(checkpoint, architecture, temporary)
        else:
            out = options.out.with_name(options.out.name.removesuffix(".gguf") + ".Modelfile")
            with exporting(out, options.overwrite) as modelfile:
                modelfile.write_text(ollama_modelfile(checkpoint, options.out.name), "utf-8")
                write_gguf(checkpoint, architecture, temporary, options.dtype)
    print(f"{checkpoint.path}: {checkpoint.model.num_parameters():,} parameters to {options.out}")


def check_exportable(
    checkpoint: Checkpoint, format_: str, architecture: str | None = None
) -> Architecture:
    """Return the architecture to write a checkpoint as: the named one, or the first that it fits.

    Raises ValueError where none fits, and for what llama.cpp cannot load where the format is gguf.
    """
    path, config = checkpoint.path, checkpoint.config
    if checkpoint.labels is not None and format_ == "gguf":
        raise ValueError(f"{path} is a classifier, which GGUF has no place for; pass --format hf")
    if checkpoint.around is not None:
        raise ValueError(f"{path} is a classifier of transformers; copy the directory")
    try:
        found = find_architecture(config, architecture)
    except ValueError as error:
        raise ValueError(
            f"{path} {error}; export a model with the switches of model=gpt2_small, modern_small, "
            f"llama_small, qwen3_small or nanochat_small"
        ) from error
    if checkpoint.labels is not None and found.model_type in WITHOUT_CLASSIFIERS:
        raise ValueError(
            f"{path} is a classifier, which {found.model_type} lacks in transformers; train it "
            f"from random weights with model=pico model.norm=rmsnorm model.activation=swiglu"
        )
    key = LLAMA_CPP_LACKS.get(found.model_type)
    if format_ == "gguf" and key and getattr(config, key):
        raise ValueError(
            f"{path} has {key}={getattr(config, key)}, which llama.cpp lacks for "
            f"{found.model_type}; pass --format hf"
        )
    return found


def write_huggingface(checkpoint: Checkpoint, architecture: Architecture, directory: Path) -> None:
    """Make a directory that AutoTokenizer and a class of transformers load with no code of ours.

    It is AutoModelForCausalLM, or AutoModelForSequenceClassification for a classifier. Generation
    ends with `<|endoftext|>`, or with the template's end of a reply.
    """
    directory.mkdir()
    config, tokenizer, labels = checkpoint.config, checkpoint.tokenizer, checkpoint.labels
    template = None if checkpoint.template is None else find_template(checkpoint.template)
    if labels is None:
        ids = dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eot_id)
        ids["bos_token_id"] = tokenizer.encode_prompt("")[0]  # of an empty prompt, there and here
        about: dict[str, Any] = {}
        kind = "LMHeadModel" if architecture.model_type == "gpt2" else "ForCausalLM"
        ends = tokenizer.eot_id if template is None else template.stop_ids(tokenizer)
        write_json(directory / "generation_config.json", {**ids, "eos_token_id": ends})
    else:
        ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot_id)
        ids["pad_token_id"] = padding_id(tokenizer)
        kind = "ForSequenceClassification"
        about = {
            "problem_type": "single_label_classification",
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    jinja = None if template is None else template.jinja(tokenizer)
    write_tokenizer(tokenizer, directory, config.block_size, jinja, framed=labels is not None)
    about |= {"architectures": [f"{architecture.prefix}{kind}"], "torch_dtype": "float32"}
    write_json(directory / CONFIG, {**architecture.write_config(config), **about, **ids})
    weights = architecture.write_weights(checkpoint.model)
    save_file(weights, directory / SAFETENSORS, metadata={"format": "pt"})
    # safetensors makes its file readable by its owner alone, whatever the umask.
    (directory / SAFETENSORS).chmod((directory / CONFIG).stat().st_mode)


def write_gguf(
    checkpoint: Checkpoint, architecture: Architecture, path: Path, dtype: str = "f32"
) -> None:
    """Write a language model as an architecture that it fits, its tokenizer and its template.

    Its keys are those of ggml-org/ggml, docs/gguf.md. With f16 the matrices are rounded, but for
    the position embeddings, which llama.cpp adds as they are. Raises ModuleNotFoundError where the
    package gguf is missing, and ValueError for a tokenizer that llama.cpp lacks, naming the part.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--format gguf needs the package gguf, which is not installed; pip install -e '.[gguf]'"
        ) from error
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    chat = None if checkpoint.template is None else find_template(checkpoint.template)
    content = described(tokenizer)
    try:
        pre = llama_cpp_name(content)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint.path} has the tokenizer {tokenizer.name} with {str(error)[:300]}, which "
            f"llama.cpp lacks; pass --format hf, or train with tokenizer=bpe, gpt2 or byte"
        ) from error
    writer = gguf.GGUFWriter(path, architecture.model_type)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner_dim)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    half = dtype == "f16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    if architecture.model_type == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        weights = biased_weights(checkpoint.model)
    else:
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_base)
        writer.add_rope_dimension_count(config.head_dim)
        weights = architecture.write_weights(checkpoint.model)
    if architecture.model_type == "apertus":
        for name, value in SQUARED_RELU.items():
            writer.add_array(f"xielu.{name}", [value] * config.n_layer)
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # required there
    tokens = {i: (f"[PAD{i}]", "UNUSED") for i in range(tokenizer.vocab_size)}
    tokens |= {i: (token, "NORMAL") for token, i in content["model"]["vocab"].items()}
    for token, i in ((added["content"], added["id"]) for added in content["added_tokens"]):
        tokens[i] = token, "CONTROL" if token in tokenizer.special_tokens else "USER_DEFINED"
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in tokens.values()])
    writer.add_token_types([gguf.TokenType[name] for _, name in tokens.values()])
    writer.add_token_merges(merges or NO_MERGES)
    writer.add_bos_token_id(tokenizer.encode_prompt("")[0])
    writer.add_eos_token_id((chat.stop_ids(tokenizer) if chat else tokenizer.end_ids)[0])
    has_bos = tokenizer.bos_id is not None and checkpoint.template in (None, "published")
    writer.add_add_bos_token(has_bos)  # our templates begin with their own token
    writer.add_add_eos_token(False)
    if chat:
        writer.add_chat_template(chat.jinja(tokenizer))
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == writer.arch)
    names = gguf.get_tensor_name_map(kind, config.n_layer)
    for name, tensor in weights.items():
        if architecture.model_type in INTERLEAVED and QUERY_KEY.search(name):
            pairs = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2)
            tensor = pairs.reshape(tensor.shape)
        rounded = half and tensor.dim() == 2 and name != "wpe.weight"
        array = tensor.numpy().astype(np.float16 if rounded else np.float32, copy=False)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array)
    if config.rope_scaling is not None:
        unscaled = rotary_speeds(replace(config, rope_scaling=None))
        writer.add_tensor("rope_freqs.weight", (unscaled / rotary_speeds(config)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ollama_modelfile(checkpoint: Checkpoint, name: str) -> str:
    """Return the Modelfile with which `ollama create` takes the GGUF file `name` next to it.

    A base model continues its prompt. A published chat template is left to Ollama, which knows the
    common ones.
    """
    tokenizer, lines = checkpoint.tokenizer, [f"FROM ./{name}"]
    chat = None if checkpoint.template is None else find_template(checkpoint.template)
    if checkpoint.template == "published":
        lines.append("# TEMPLATE: where Ollama does not know the model's chat template, write it")
    else:
        lines.append(f'TEMPLATE """{chat.go(tokenizer) if chat else "{{ .Prompt }}"}"""')
    names = {i: token for token, i in tokenizer.special_tokens.items()}
    stops = [*map(names.get, chat.stop_ids(tokenizer)), *chat.stop_texts] if chat else []
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)]
    return "\n".join([*lines, f"PARAMETER num_ctx {checkpoint.config.block_size}", ""])


@contextmanager
def exporting(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path that becomes `out` when the block ends, and goes when it raises.

    Raises FileExistsError where `out` exists, unless it is an export and may be overwritten.
    """
    if out.exists():
        if out.is_dir():
            is_export = (out / CONFIG).is_file()
        else:
            with out.open("rb") as file:
                is_export = file.read(4) in (b"GGUF", b"FROM")
        if not (is_export and overwrite):
            advice = ", or --overwrite" if is_export else ": it is no export"
            raise FileExistsError(f"{out} exists; pass another path{advice}")
    out.parent.mkdir(parents=True, exist_ok=True)
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
    what = "Write a checkpoint for others: a Hugging Face directory, or a GGUF file."
    parser = make_parser("nanogpt.export", what, "checkpoint", "--runs-dir")
    parser.add_argument("out", type=Path, help="the directory or file to write")
    parser.add_argument("--format", required=True, choices=("hf", "gguf"))
    parser.add_argument(
        "--dtype",
        default="f32",
        choices=("f32", "f16"),
        help="of the matrices in a GGUF file (default f32)",
    )
    parser.add_argument(
        "--architecture",
        choices=ARCHITECTURES,
        help="to write (default: the first that the model fits)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    return parser


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
