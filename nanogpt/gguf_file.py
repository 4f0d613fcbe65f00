"""GGUF, the one-file format of llama.cpp, through the package `gguf`.

Keys: ggml-org/ggml, docs/gguf.md.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.checkpoint import Checkpoint
from nanogpt.model import NORM_EPSILON
from nanogpt.pretrained import gpt2_weights
from nanogpt.prompts import find_template
from nanogpt.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from nanogpt.tokenizer_files import merges_of, spell, spellings

KNOWN_PATTERNS = (GPT2_PATTERN, "")  # bytes that never merge may be cut by any pattern
NO_MERGES = [f"{END_OF_TEXT} {END_OF_TEXT}"]  # occurs in no text; the list may not be empty


def write_gguf(checkpoint: Checkpoint, path: Path, dtype: str = "f32") -> None:
    """Write a GPT-2 language model, its tokenizer and its template into a file.

    With f16 the matrices are rounded, but for the position embeddings, which llama.cpp adds as they
    are. Raises ModuleNotFoundError where the package gguf is missing, and ValueError for a
    tokenizer with a pattern of its own: the file can only name a pattern that llama.cpp knows.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--format gguf needs the package gguf, which is not installed; pip install -e '.[gguf]'"
        ) from error
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    if tokenizer.pattern not in KNOWN_PATTERNS:
        raise ValueError(
            f"{checkpoint.path} has the tokenizer {tokenizer.name}, which cuts texts by a pattern "
            f"that no reader of GGUF knows; pass --format hf, or train with tokenizer=gpt2 or "
            f"tokenizer=byte"
        )
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(NORM_EPSILON)
    half = dtype == "f16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokenizer, gguf.TokenType)
    if checkpoint.template is not None:
        writer.add_chat_template(find_template(checkpoint.template).jinja())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in gpt2_weights(checkpoint.model).items():
        rounded = half and tensor.dim() == 2 and name != "wpe.weight"
        array = tensor.numpy().astype(np.float16 if rounded else np.float32, copy=False)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, types: Any) -> None:
    """Add the tokens, and whether a text begins with one of them."""
    n_special = len(tokenizer.special_tokens)
    n_ordinary = tokenizer.vocab_size - n_special
    merges = [f"{spell(a)} {spell(b)}" for a, b in merges_of(tokenizer)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(spellings(tokenizer))
    writer.add_token_types([types.NORMAL] * n_ordinary + [types.CONTROL] * n_special)
    writer.add_token_merges(merges or NO_MERGES)
    writer.add_bos_token_id(tokenizer.encode_prompt("")[0])
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
