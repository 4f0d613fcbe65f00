"""A text has the same token ids wherever a model reads it."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from nanogpt.checkpoint import load_checkpoint, record, write_checkpoint
from nanogpt.evaluation.scoring import encode_pair
from nanogpt.export import main as export
from nanogpt.generate import main as generate
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import Tokenizer, byte_tokenizer, from_record
from nanogpt.tokenizer_files import read_tokenizer
from nanogpt.training import callbacks
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, generated, serve

EOT, BOS = 256, 257
TEXT = "Grüße <|endoftext|>"
BYTES = [*TEXT.encode()]
NO_BOS = byte_tokenizer()
WITH_BOS = from_record({**NO_BOS.record(), "bos_token": "<|reserved_0|>"})

Ids = list[int]
Read = Callable[[Tokenizer, str, Path, pytest.MonkeyPatch], Ids]


def checkpoint(tokenizer: Tokenizer, folder: Path) -> str:
    shape: Any = {"position": "learned", "norm": "layernorm", "activation": "gelu"}
    config = GPTConfig(64, tokenizer.vocab_size, 1, 2, 8, qk_norm=False, **shape)
    torch.manual_seed(0)
    weights = {f"model.{name}": t for name, t in GPT(config).state_dict().items()}
    content = {"global_step": 1, "state_dict": weights}
    about = record("pretrain", config, tokenizer)
    write_checkpoint(content | {"nanogpt": about}, folder / "a.ckpt")
    return str(folder / "a.ckpt")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Ids]:
    """Replace `generate`; return the prompts that it will be called with."""
    read: list[Ids] = []

    def nothing(model: GPT, ids: Ids, **options: Any) -> Iterator[int]:
        read.append(ids)
        return iter(())

    monkeypatch.setattr("nanogpt.generation.generate", nothing)
    return read


def post(tokenizer: Tokenizer, folder: Path, path: str, body: dict[str, Any]) -> tuple[Any, Ids]:
    """Return the server's answer, and the prompt that reached the engine."""
    engine = FakeEngine(f"unix:{folder}/e", reply=fixed_reply("a"), tokenizer=tokenizer)
    with serve(engine) as url:
        answer = httpx.post(url + path, json=body).json()
    return answer, next((request.prompt_ids for request in generated(engine)), [])


def by_tokenize(tokenizer: Tokenizer, text: str, folder: Path, _: Any) -> Ids:
    answer, _ids = post(tokenizer, folder, "/tokenize", {"prompt": text})
    assert answer["count"] == len(answer["tokens"])
    return list(answer["tokens"])


def by_completion(tokenizer: Tokenizer, text: str, folder: Path, _: Any) -> Ids:
    body = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 0}
    answer, ids = post(tokenizer, folder, "/v1/completions", body)
    [choice] = answer["choices"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert choice["text"] == f"{text}a"
    return ids


def by_predict(tokenizer: Tokenizer, text: str, folder: Path, _: Any) -> Ids:
    return post(tokenizer, folder, "/predict", {"input_data": text})[1]


def by_generate(
    tokenizer: Tokenizer, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Ids:
    read = recorded(monkeypatch)
    assert generate([checkpoint(tokenizer, folder), "--prompt", text]) == 0
    return read[0]


def by_samples(
    tokenizer: Tokenizer, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Ids:
    read = recorded(monkeypatch)
    options: Any = {"max_new_tokens": 1, "temperature": 0.0, "top_k": None, "seed": 0}
    samples = callbacks.Samples(folder, every_n_steps=1, prompts=[text], **options)
    module: Any = SimpleNamespace(model=None, tokenizer=tokenizer, template=None)
    samples.write(module, 1)
    return read[0]


def by_evaluation(tokenizer: Tokenizer, text: str, folder: Path, _: Any) -> Ids:
    context, continuation = encode_pair(tokenizer, text, " a")
    assert continuation == [*b" a"]
    return context


def by_harness(tokenizer: Tokenizer, text: str, folder: Path, monkeypatch: Any) -> Ids:
    pytest.importorskip("lm_eval", reason='needs the extra: pip install -e ".[eval]"')
    from nanogpt.evaluation import harness

    read = recorded(monkeypatch)
    model = harness.HarnessModel(load_checkpoint(checkpoint(tokenizer, folder)))
    model.generate_until([SimpleNamespace(args=(text, {}))])
    if text:
        assert model.tok_encode(text) == read[0]
    return read[0]


def by_transformers(tokenizer: Tokenizer, text: str, folder: Path, _: Any) -> Ids:
    from transformers import AutoTokenizer

    assert export([checkpoint(tokenizer, folder), str(folder / "hf"), "--format", "hf"]) == 0
    ids = AutoTokenizer.from_pretrained(folder / "hf")(text)["input_ids"]
    config = json.loads((folder / "hf" / "generation_config.json").read_text())
    assert read_tokenizer(folder / "hf") == tokenizer  # and back
    return list(ids) or [config["bos_token_id"]]  # which transformers generates from


def by_gguf(tokenizer: Tokenizer, text: str, folder: Path, _: Any) -> Ids:
    gguf = pytest.importorskip("gguf")
    out = folder / "a.gguf"
    assert export([checkpoint(tokenizer, folder), str(out), "--format", "gguf"]) == 0
    fields = gguf.GGUFReader(out).fields
    bos, adds = (fields[f"tokenizer.ggml.{name}"] for name in ("bos_token_id", "add_bos_token"))
    begins = [int(bos.contents())] if adds.contents() or not text else []
    return [*begins, *tokenizer.encode(text)]


READERS: Sequence[Read] = [
    by_tokenize,
    by_completion,
    by_predict,
    by_generate,
    by_samples,
    by_evaluation,
    by_harness,
    by_transformers,
    by_gguf,
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (NO_BOS, TEXT, BYTES),
        (NO_BOS, "", [EOT]),
        (WITH_BOS, TEXT, [BOS, *BYTES]),
        (WITH_BOS, "", [BOS]),
    ],
    ids=["text", "nothing", "text after BOS", "BOS alone"],
)
def test_a_text_is_read_as_it_is_and_an_empty_one_begins_a_document(
    tokenizer: Tokenizer,
    text: str,
    expected: Ids,
    read: Read,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert read(tokenizer, text, tmp_path, monkeypatch) == expected


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
def test_special_tokens_can_be_left_out(tmp_path: Path, path: str) -> None:
    body = {"prompt": TEXT, "add_special_tokens": False}
    answer, ids = post(WITH_BOS, tmp_path, path, body)
    assert answer.get("tokens", ids) == BYTES
