"""Token files of others' making: what one is, told by its content, and where its tokens lie."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import IO

import numpy as np

from nanogpt.data.shards import MAGIC_AND_VERSION, UINT16, Part, shard_part
from nanogpt.text import first_line

SUFFIXES = (".bin", ".npy")
VAL_WORDS = {"val", "valid", "validation", "test"}
REMEDY = "fetch the file again, or take it out of data.path"


def recognise(path: Path) -> Part:
    """Return where the tokens of a file lie, told by how it begins."""
    with path.open("rb") as file:
        begin = file.read(8)
    if begin.startswith(np.lib.format.MAGIC_PREFIX):
        return _npy_part(path)
    # As uint16 either magic number begins with a number above 55,000: no text of GPT-2's does.
    has_magic = begin[:4] in {np.array(m, "<i4").tobytes() for m, _ in MAGIC_AND_VERSION.values()}
    if path.suffix == ".bin" and not has_magic and path.stem in {"train", *VAL_WORDS}:
        return _bare_part(path)
    return shard_part(path, REMEDY)


def check_numbers(paths: Sequence[Path]) -> None:
    """Raise FileNotFoundError where a numbered series has a gap; it may begin at any number."""
    numbered = [m for path in paths if (m := re.fullmatch(r"(.*?)(\d+)(\.\w+)", path.name))]
    for (prefix, suffix), series in groupby(
        sorted(numbered, key=lambda m: (m[1], m[3], int(m[2]))), key=lambda m: (m[1], m[3])
    ):
        names = {int(match[2]): match[2] for match in series}
        first, last = min(names), max(names)
        if missing := next((n for n in range(first, last) if n not in names), None):
            name = f"{prefix}{missing:0{len(names[first])}d}{suffix}"
            n_missing = last - first + 1 - len(names)
            raise FileNotFoundError(
                f"{paths[0].parent} lacks {name} ({n_missing} missing between {first} and {last}); "
                f"fetch it, or remove the shards on one side of the gap"
            )


def check_alike(parts: Sequence[Part]) -> None:
    """Raise ValueError where two files are of different types or makers."""
    for part in parts[1:]:
        if _make(part) != _make(parts[0]):
            raise ValueError(
                f"{part.path} holds {_make(part)} and {parts[0].path.name} beside it "
                f"{_make(parts[0])}; keep one kind in the folder"
            )


def names_validation(path: Path) -> bool:
    """Return whether a file's name has one of the words for validation."""
    return bool(VAL_WORDS & set(re.split(r"[^a-z]+", path.stem.lower())))


def cut(parts: Iterable[Part], start: int, stop: int) -> list[Part]:
    """Return the tokens from `start` up to `stop` of the parts end to end."""
    sliced = []
    for part in parts:
        first, end = max(start, 0), min(stop, part.n_tokens)
        if first < end:
            offset_bytes = part.offset_bytes + first * part.dtype.itemsize
            sliced.append(replace(part, offset_bytes=offset_bytes, n_tokens=end - first))
        start, stop = start - part.n_tokens, stop - part.n_tokens
    return sliced


def _bare_part(path: Path) -> Part:
    """Return the tokens of nanoGPT's files, which are uint16 and nothing else."""
    if (path.parent / "meta.pkl").exists():
        raise ValueError(
            f"{path.parent} was tokenized with the characters in its meta.pkl, which no tokenizer "
            f"here knows; pass the text itself, as in data=text data.path=input.txt tokenizer=byte"
        )
    n_bytes = path.stat().st_size
    if n_bytes == 0 or n_bytes % UINT16.itemsize:
        raise ValueError(
            f"{path} has {n_bytes} bytes, which is no whole number of uint16 tokens; {REMEDY}"
        )
    return Part(path, UINT16, 0, n_bytes // UINT16.itemsize)


def _npy_part(path: Path) -> Part:
    with path.open("rb") as file:
        shape, dtype = _npy_header(file, path)
        offset_bytes = file.tell()
    if dtype.kind not in "ui" or len(shape) != 1:
        raise ValueError(
            f"{path} is an array of {dtype} with shape {shape}, and tokens are whole numbers in "
            f"one dimension; {REMEDY}"
        )
    promised, n_bytes = offset_bytes + shape[0] * dtype.itemsize, path.stat().st_size
    if n_bytes != promised:
        raise ValueError(
            f"{path} is {'cut short' if n_bytes < promised else 'longer than it says'}: its header "
            f"promises {promised} bytes, and it has {n_bytes}; {REMEDY}"
        )
    return Part(path, dtype, offset_bytes, shape[0])


def _npy_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type, leaving the file where the numbers begin."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"{path} has a broken NumPy header ({first_line(error)}); {REMEDY}"
        ) from error
    return shape, dtype


def _make(part: Part) -> str:
    header = "" if part.offset_bytes else " without a header"
    return f"{part.dtype} tokens as {part.path.suffix}{header}"
