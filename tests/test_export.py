"""What is exported computes and encodes elsewhere as it does here, and comes back bit for bit."""

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from nanogpt.architectures import without_embedding_norm
from nanogpt.checkpoint import (
    init_model,
    load_checkpoint,
    record,
    weights_sha256,
    write_checkpoint,
)
from nanogpt.classifier import Classifier, class_probabilities, encode_text
from nanogpt.export import exporting, main
from nanogpt.generation import generate
from nanogpt.model import GPT, GPTConfig
from nanogpt.pretrained import load_pretrained
from nanogpt.prompts import Message, find_template
from nanogpt.published import PublishedTokenizer
from nanogpt.tokenizer import (
    BYTES,
    END_OF_TEXT,
    Tokenizer,
    bpe_tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
)
from nanogpt.tokenizer_files import LETTERS, QWEN2_PATTERN, read_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        pipeline,
    )

SMALL: dict[str, Any] = {"block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 48}
MODERN: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "bias": False}
LLAMA = {**MODERN, "activation": "swiglu"}
QWEN3 = {**LLAMA, "qk_norm": True, "qk_norm_weight": True}
ARCEE = {**MODERN, "activation": "relu2"}
APERTUS = {**QWEN3, "activation": "relu2"}
NANOCHAT = {
    **ARCEE,
    "qk_norm": True,
    "norm_weight": False,
    "embd_norm": True,
    "tie_embeddings": False,
    "logit_softcap": 15.0,
}
SCALED: dict[str, Any] = {"rope_base": 5e5, "rope_scaling": (8.0, 1.0, 4.0, 32)}
SHAPES = {  # the class in transformers, and a shape
    "GPT2": {"tie_embeddings": False, "n_inner": 100, "norm_eps": 1e-6},
    "Llama": {**LLAMA, **SCALED, "n_kv_head": 2, "n_inner": 100, "tie_embeddings": False},
    "Llama with biases": {**LLAMA, "bias": True},
    "Qwen3": {**QWEN3, "n_kv_head": 1, "head_size": 32, "norm_eps": 1e-6},
    "Arcee": {**ARCEE, "n_kv_head": 2, "tie_embeddings": False},
    "Apertus": {**APERTUS, "n_kv_head": 2, "head_size": 32},
    "Apertus with scaling": {**APERTUS, **SCALED, "tie_embeddings": False},
    "NanoChat": {**NANOCHAT, **SCALED, "n_kv_head": 2, "n_inner": 100, "head_size": 32},
    "NanoChat without a cap": {**NANOCHAT, "logit_softcap": None, "tie_embeddings": True},
}
LABELS = ["ham", "spam", "né <b>"]
TWICE = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFC"}]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTES_ALONE = {**BYTE_LEVEL, "use_regex": False}
PROMPT = "def main(argv):\r\n    return 'é😀' <|endoftext|>"

Write = Callable[..., Path]


def random_model(config: GPTConfig, labels: list[str] | None = None) -> GPT:
    """A model whose every tensor, biases and norms too, is random."""
    torch.manual_seed(0)
    model = GPT(config) if labels is None else Classifier(config, len(labels))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a checkpoint of a small model, with changes, and return its path."""

    def write(
        tokenizer: Tokenizer | None = None, *, stage: str = "pretrain", **changes: Any
    ) -> Path:
        tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
        template, labels = changes.pop("template", None), changes.pop("labels", None)
        config = GPTConfig(**{**SMALL, "vocab_size": tokenizer.vocab_size, **changes})
        weights = random_model(config, labels).state_dict()
        content = {
            "global_step": 1,
            "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
            "nanogpt": record(stage, config, tokenizer, template=template, labels=labels),
        }
        write_checkpoint(content, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return write


def small_bpe() -> Tokenizer:
    return bpe_tokenizer([Path(__file__).read_text(encoding="utf-8")], 500)


def export(checkpoint: Path, out: Path, *options: str) -> int:
    return main([str(checkpoint), str(out), *(options or ("--format", "hf"))])


def greedy(model: GPT, ids: list[int], n_tokens: int) -> list[int]:
    steps = generate(model, ids, max_new_tokens=n_tokens, temperature=0)
    return list(itertools.islice(steps, n_tokens))


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, small_bpe])
def test_transformers_reads_the_directory_with_no_code_of_ours(
    make_tokenizer: Callable[[], Tokenizer], write: Write, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    checkpoint, out = write(tokenizer), tmp_path / "out"
    assert export(checkpoint, out) == 0
    ours = init_model(checkpoint).model
    theirs: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"

    ids = list(AutoTokenizer.from_pretrained(out)(PROMPT)["input_ids"])
    assert ids == tokenizer.encode(PROMPT)
    ids = ids[:40]
    with torch.inference_mode():
        difference = ours(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits
    assert difference.abs().max() <= 1e-4

    theirs.generation_config.eos_token_id = None  # all twenty, whatever they are
    continued = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
    assert continued[0, len(ids) :].tolist() == greedy(ours, ids, 20)


@pytest.mark.parametrize("name", SHAPES)
def test_each_architecture_computes_there_what_it_does_here(
    name: str, write: Write, tmp_path: Path
) -> None:
    checkpoint, out = write(**SHAPES[name]), tmp_path / "out"
    assert export(checkpoint, out) == 0
    ours = init_model(checkpoint).model
    theirs: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(theirs).__name__.startswith(name.partition(" ")[0])
    ids = byte_tokenizer().encode(PROMPT)[:40]
    with torch.inference_mode():
        difference = ours(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits
    assert difference.abs().max() <= 1e-4
    theirs.generation_config.eos_token_id = None
    continued = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
    assert continued[0, len(ids) :].tolist() == greedy(ours, ids, 20)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("by_transformers", [False, True])
def test_each_architecture_reads_back_bit_for_bit(
    name: str, by_transformers: bool, write: Write, tmp_path: Path
) -> None:
    checkpoint, out = write(**SHAPES[name]), tmp_path / "out"
    export(checkpoint, out)
    if by_transformers:
        AutoModelForCausalLM.from_pretrained(out).save_pretrained(
            tmp_path / "saved", max_shard_size="100KB"
        )
        out = tmp_path / "saved"
    ours, back = init_model(checkpoint).model, load_pretrained(out)
    assert weights_sha256(back) == weights_sha256(ours)
    assert back.config == ours.config


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("Llama with biases", {"mlp_bias": False}, "has attention_bias=True; only False can be"),
        ("NanoChat", {"attention_bias": True}, "has attention_bias=True; only False can be"),
        ("NanoChat", {"hidden_act": "silu"}, "has hidden_act='silu'; only 'relu2' can be read"),
        ("NanoChat", {"head_dim": 8}, "has weights of wrong shapes|size mismatch"),
    ],
)
def test_what_no_model_here_computes_is_not_read(
    name: str, values: dict[str, Any], message: str, write: Write, tmp_path: Path
) -> None:
    export(write(**SHAPES[name]), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "out")


def test_queries_and_keys_without_weights_are_normalised_alike_by_qwen3(
    write: Write, tmp_path: Path
) -> None:
    export(write(**LLAMA, qk_norm=True), tmp_path / "out")
    ours, back = init_model(tmp_path / "last.ckpt").model, load_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([byte_tokenizer().encode(PROMPT)[:40]])
    assert torch.equal(ours(ids), back(ids))


def test_an_export_reads_back_bit_for_bit(write: Write, tmp_path: Path) -> None:
    tokenizer = small_bpe()
    checkpoint, out = write(tokenizer), tmp_path / "out"
    export(checkpoint, out)
    back = init_model(out)
    assert weights_sha256(back.model) == weights_sha256(init_model(checkpoint).model)
    assert back.tokenizer.fingerprint == tokenizer.fingerprint
    assert back.config == GPTConfig(**SMALL, vocab_size=tokenizer.vocab_size)


def test_a_large_table_has_exactly_its_rows(write: Write, tmp_path: Path) -> None:
    vocabulary = bpe_tokenizer([Path(__file__).read_text(encoding="utf-8")], 300)
    vocabulary.special_tokens.update({f"<|{i}|>": 300 + i for i in range(8000)})
    tokens = [*vocabulary.token_bytes(), *(b"" for _ in range(8000))]
    vars(vocabulary)["_token_bytes"] = tokens
    export(write(vocabulary, n_layer=1, n_head=1, n_embd=8), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("transformer.wte.weight").get_shape() == [8300, 8]
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - no iterator


def test_a_model_without_biases_computes_the_same(write: Write, tmp_path: Path) -> None:
    checkpoint = write(bias=False)
    assert export(checkpoint, tmp_path / "out") == 0
    ids = torch.arange(32)[None]
    ours, theirs = init_model(checkpoint).model, load_pretrained(tmp_path / "out").eval()
    assert (ours(ids) - theirs(ids)).abs().max() <= 1e-6


def test_generation_ends_with_the_text(write: Write, tmp_path: Path) -> None:
    export(write(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["eos_token_id"] == byte_tokenizer().eot_id


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Echo é <b>\n"},
    {"role": "assistant", "content": "é"},
    {"role": "user", "content": "Again"},
]


@pytest.mark.parametrize("name", ["alpaca", "plain", "chat"])
def test_a_template_travels_as_a_chat_template(name: str, write: Write, tmp_path: Path) -> None:
    template = find_template(name)
    tokenizer = byte_tokenizer().with_special_tokens(template.special_tokens)
    export(write(tokenizer, template=name), tmp_path / "out")
    there: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = there.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    messages = [Message(**message) for message in TALK]
    assert list(ids) == template.encode(tokenizer, messages, add_generation_prompt=True)[0]
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["eos_token_id"] == template.stop_ids(tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "rotary"}, "has position=rotary, which gpt2, the nearest of gpt2, llama"),
        ({"qk_norm": True}, "export a model with the switches of model=gpt2_small, modern_small"),
        ({"norm": "rmsnorm", "bias": False}, "has norm=rmsnorm, which"),
        ({**ARCEE, "qk_norm": True, "bias": True}, "has qk_norm=True, which arcee, the nearest of"),
        ({**LLAMA, "logit_softcap": 15.0}, "has logit_softcap=15.0, which llama"),
        ({**QWEN3, "bias": True}, "has bias=True, which qwen3"),
    ],
)
@pytest.mark.parametrize("format_", ["hf", "gguf"])
def test_what_the_format_lacks_is_refused_in_one_sentence(
    format_: str,
    changes: dict[str, Any],
    message: str,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(write(**changes), tmp_path / "out", "--format", format_) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt"]


def test_nanochat_has_norms_without_weights_alone(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(write(**NANOCHAT | {"norm_weight": True}), tmp_path / "out") == 1
    assert "has norm_weight=True, which nanochat" in capsys.readouterr().err


def test_half_precision_is_for_gguf_only(write: Write, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        export(write(), tmp_path / "out", "--format", "hf", "--dtype", "f16")
    assert stopped.value.code == 2


def test_an_existing_export_needs_overwrite(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = write(), tmp_path / "out"
    export(checkpoint, out)
    (out / "note").write_text("mine")
    assert export(checkpoint, out) == 1
    assert "exists; pass another path, or --overwrite" in capsys.readouterr().err
    assert (out / "note").exists()
    assert export(checkpoint, out, "--format", "hf", "--overwrite") == 0
    assert not (out / "note").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "out"]


@pytest.mark.parametrize("name", [".", "last.ckpt"])
def test_what_is_no_export_is_never_overwritten(
    name: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write()
    before = checkpoint.read_bytes()
    assert export(checkpoint, tmp_path / name, "--format", "gguf", "--overwrite") == 1
    assert "exists; pass another path: it is no export" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("name", ["last.ckpt/out", "last.ckpt/new/out"])
def test_a_path_under_a_file_is_refused(
    name: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(write(), tmp_path / name) == 1
    assert "last.ckpt" in capsys.readouterr().err


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_bytes(b"GGUF, old")

    def fail() -> None:
        with exporting(out, overwrite=True) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert out.read_bytes() == b"GGUF, old"
    assert list(tmp_path.iterdir()) == [out]


# Classifiers


def gpt2() -> Tokenizer:
    try:
        return gpt2_tokenizer()
    except FileNotFoundError as error:
        pytest.skip(str(error))


each_tokenizer = pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, small_bpe, gpt2])
TEXTS = [
    "",
    "spam",
    " \r\n\t ",
    "a<|endoftext|>b<|reserved_15|> ",
    "ÿ! 😀👩‍👩‍👧 naïve é 　\x00",
    "Win £1000 now!!! " * 40,
    "!",
    "x" * 62,
]


@pytest.mark.parametrize(
    ("make_tokenizer", "bias"),
    [(byte_tokenizer, True), (byte_tokenizer, False), (small_bpe, True), (gpt2, True)],
)
def test_a_pipeline_gives_our_probabilities(
    make_tokenizer: Callable[[], Tokenizer], bias: bool, write: Write, tmp_path: Path
) -> None:
    checkpoint = write(make_tokenizer(), stage="classify", labels=LABELS, bias=bias)
    assert export(checkpoint, tmp_path / "out") == 0
    ours = load_checkpoint(checkpoint)
    assert isinstance(ours.model, Classifier)
    expected = class_probabilities(ours.model, ours.tokenizer, TEXTS)
    there: Any = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    for batch_size in (1, 3, 8):
        found = there(TEXTS, top_k=None, truncation=True, batch_size=batch_size)
        by_label = [{row["label"]: row["score"] for row in rows} for rows in found]
        scores = torch.tensor([[rows[label] for label in LABELS] for rows in by_label])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@each_tokenizer
def test_texts_are_framed_cut_and_padded_on_the_right(
    make_tokenizer: Callable[[], Tokenizer], write: Write, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    export(write(tokenizer, labels=LABELS), tmp_path / "out")
    there = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = there(TEXTS, truncation=True, padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    for text, ids, mask in zip(TEXTS, batch["input_ids"], batch["attention_mask"], strict=True):
        expected, _ = encode_text(tokenizer, text, SMALL["block_size"])
        n_padding = len(ids) - len(expected)
        assert ids == expected + [there.pad_token_id] * n_padding, text
        assert mask == [1] * len(expected) + [0] * n_padding
    assert all(there.pad_token_id not in tokenizer.encode(text) for text in TEXTS)


def test_a_classifier_names_its_classes(write: Write, tmp_path: Path) -> None:
    export(write(labels=LABELS), tmp_path / "out")
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "GPT2ForSequenceClassification"
    assert theirs.config.num_labels == 3
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id == {"ham": 0, "spam": 1, "né <b>": 2}


@pytest.mark.parametrize("by_transformers", [False, True])
@each_tokenizer
def test_a_classifier_reads_back_bit_for_bit(
    make_tokenizer: Callable[[], Tokenizer], by_transformers: bool, write: Write, tmp_path: Path
) -> None:
    checkpoint, out = write(make_tokenizer(), labels=LABELS), tmp_path / "out"
    export(checkpoint, out)
    if by_transformers:
        model: Any = AutoModelForSequenceClassification.from_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        out = tmp_path / "saved"
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    ours, back = load_checkpoint(checkpoint), load_pretrained(out)
    assert isinstance(back, Classifier)
    assert weights_sha256(back) == weights_sha256(ours.model)
    start = init_model(out)
    assert weights_sha256(start.model) == weights_sha256(init_model(checkpoint).model)
    assert start.tokenizer.fingerprint == ours.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("format_", "changes", "message"),
    [
        ("gguf", {}, "is a classifier, which GGUF has no place for; pass --format hf"),
        ("hf", {"norm": "rmsnorm", "bias": False}, "has norm=rmsnorm, which gpt2"),
        ("hf", NANOCHAT, "is a classifier, which nanochat lacks in transformers; train it from"),
        ("hf", APERTUS, "is a classifier, which apertus lacks in transformers; train it from"),
    ],
)
def test_a_classifier_that_the_format_lacks_is_refused(
    format_: str,
    changes: dict[str, Any],
    message: str,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(write(labels=LABELS, **changes), tmp_path / "out", "--format", format_) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt"]


# GGUF


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**ARCEE, "bias": True}, "bias=True, which llama.cpp lacks for arcee"),
        ({**QWEN3, **SCALED}, "which llama.cpp lacks for qwen3; pass --format hf"),
        (NANOCHAT, "has logit_softcap=15.0, which apertus, the nearest"),
    ],
)
def test_tensors_that_llama_cpp_refuses_are_not_written(
    changes: dict[str, Any],
    message: str,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(write(**changes), tmp_path / "out", "--format", "gguf") == 1
    assert message in capsys.readouterr().err


def read_gguf(path: Path) -> Any:
    return pytest.importorskip("gguf").GGUFReader(path)


def field(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def test_a_gguf_file_holds_the_weights_bit_for_bit(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    checkpoint, out = write(), tmp_path / "out.gguf"
    assert export(checkpoint, out, "--format", "gguf") == 0
    found = {tensor.name: np.array(tensor.data) for tensor in read_gguf(out).tensors}
    weights = init_model(checkpoint).model.state_dict()
    assert len(found) == len(weights)
    for there, ours in [
        ("token_embd.weight", "wte.weight"),
        ("position_embd.weight", "wpe.weight"),
        ("blk.2.attn_qkv.weight", "h.2.attn.c_attn.weight"),
        ("blk.1.attn_output.bias", "h.1.attn.c_proj.bias"),
        ("blk.0.ffn_up.weight", "h.0.mlp.c_fc.weight"),
        ("blk.0.ffn_down.weight", "h.0.mlp.c_proj.weight"),
        ("blk.0.ffn_norm.bias", "h.0.ln_2.bias"),
        ("output_norm.weight", "ln_f.weight"),
    ]:
        assert np.array_equal(found[there], weights[ours].numpy()), there


@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_are_normalised_in_the_file_for_llama_cpp(
    is_tied: bool, write: Write, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    shape = {**NANOCHAT, "logit_softcap": None, "tie_embeddings": is_tied}
    model = load_checkpoint(write(**shape)).model
    assert export(tmp_path / "last.ckpt", tmp_path / "out.gguf", "--format", "gguf") == 0
    reader = read_gguf(tmp_path / "out.gguf")
    assert field(reader, "general.architecture") == "apertus"
    found = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    table, norm = model.wte.weight, F.rms_norm(model.wte.weight, (48,), eps=1e-5)
    assert torch.equal(found["token_embd.weight"], norm)
    assert torch.equal(found["output.weight"], table if is_tied else model.lm_head.weight)
    for name in ("output_norm", "blk.2.attn_norm", "blk.0.ffn_norm", "blk.1.attn_q_norm"):
        assert torch.equal(found[f"{name}.weight"], torch.ones(48 if "attn_q" not in name else 12))
    ids = torch.tensor([byte_tokenizer().encode(PROMPT)[:40]])
    torch.testing.assert_close(without_embedding_norm(model)(ids), model(ids))


def test_llama_cpp_computes_the_squared_relu_as_an_xielu(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export(write(**APERTUS), tmp_path / "out.gguf", "--format", "gguf")
    reader, x = read_gguf(tmp_path / "out.gguf"), torch.linspace(-3, 3, 101)
    alphas = [field(reader, f"xielu.alpha_{sign}") for sign in "pn"]
    assert [len(alpha) for alpha in alphas] == [3, 3]
    positive, negative = (F.softplus(torch.tensor(alpha[0])) for alpha in alphas)
    beta, eps = field(reader, "xielu.beta")[0], torch.tensor(field(reader, "xielu.eps")[0])
    below = (torch.expm1(torch.minimum(x, eps)) - x) * (beta + negative)
    xielu = torch.where(x > 0, positive * x * x, below) + beta * x
    assert torch.allclose(xielu, F.relu(x).square(), rtol=1e-6, atol=0)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_half_precision_rounds_the_matrices_only(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export(write(), tmp_path / "out.gguf", "--format", "gguf", "--dtype", "f16")
    types = {
        tensor.name: np.array(tensor.data).dtype
        for tensor in read_gguf(tmp_path / "out.gguf").tensors
    }
    assert types["blk.0.attn_qkv.weight"] == types["token_embd.weight"] == np.float16
    assert types["blk.0.attn_qkv.bias"] == types["position_embd.weight"] == np.float32


def test_a_gguf_file_names_its_tokens_and_adds_none_to_a_text(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tokenizer = byte_tokenizer()
    export(write(), tmp_path / "out.gguf", "--format", "gguf")
    reader = read_gguf(tmp_path / "out.gguf")
    tokens, types = (field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert len(tokens) == tokenizer.vocab_size
    assert (tokens[32], tokens[97], tokens[256]) == ("Ġ", "a", "<|endoftext|>")
    assert types == [1] * 256 + [3] * 17  # normal, control
    assert field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eot_id
    assert field(reader, "tokenizer.ggml.add_bos_token") is False


def test_a_gguf_file_carries_the_template(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export(write(template="alpaca"), tmp_path / "out.gguf", "--format", "gguf")
    reader = read_gguf(tmp_path / "out.gguf")
    assert field(reader, "tokenizer.chat_template") == find_template("alpaca").jinja(
        byte_tokenizer()
    )


def test_a_gguf_file_names_the_pattern_of_bpe_and_lists_its_merges(
    write: Write, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    tokenizer = bpe_tokenizer(["low lower lowest"], 1000)
    assert export(write(tokenizer), tmp_path / "out.gguf", "--format", "gguf") == 0
    reader = read_gguf(tmp_path / "out.gguf")
    assert field(reader, "tokenizer.ggml.pre") == "qwen2"
    assert field(reader, "tokenizer.ggml.merges")[:2] == ["l o", "lo w"]
    assert field(reader, "tokenizer.ggml.tokens")[256:258] == ["lo", "low"]


def published(directory: Path, **changes: Any) -> Tokenizer:
    """Return a published tokenizer: `he` alone is merged, three ids are added and two unused."""
    vocab = {token: i for i, token in enumerate([*LETTERS.values(), "he"])}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, {**BYTE_LEVEL, "use_regex": False}]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [("<|endoftext|>", True), ("<|im_end|>", True), ("<think>", False)]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 257 + i, "content": token, "special": special, **flags}
            for i, (token, special) in enumerate(added)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {**BYTE_LEVEL, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["h", "e"]]},
    }
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    config = {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(directory, 262)
    assert isinstance(tokenizer, PublishedTokenizer)
    return tokenizer


def test_a_gguf_file_has_the_tokens_of_a_published_model(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    checkpoint = write(published(tmp_path / "there"), template="published")
    assert export(checkpoint, tmp_path / "out.gguf", "--format", "gguf") == 0
    reader = read_gguf(tmp_path / "out.gguf")
    tokens, types = (field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert (field(reader, "tokenizer.ggml.pre"), tokens[256]) == ("qwen2", "he")
    names = ["<|endoftext|>", "<|im_end|>", "<think>", "[PAD260]", "[PAD261]"]
    assert (tokens[257:], types[256:]) == (names, [1, 3, 3, 4, 5, 5])  # control, user's, unused
    assert field(reader, "tokenizer.ggml.eos_token_id") == 258


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": TWICE}, 'with {"normalizer": {"type": "Sequence", "normalizers": ['),
        ({"pre_tokenizer": BYTES_ALONE}, 'with {"pre_tokenizer": []}, which llama.cpp lacks; pass'),
    ],
)
def test_a_part_of_a_tokenizer_that_llama_cpp_lacks_is_named(
    changes: dict[str, Any],
    message: str,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("gguf")
    checkpoint = write(published(tmp_path / "there", **changes))
    assert export(checkpoint, tmp_path / "out.gguf", "--format", "gguf") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_a_pattern_that_llama_cpp_lacks_is_refused(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    tokenizer = Tokenizer("bpe", r"\w+|\W", [*BYTES, b"he"], [END_OF_TEXT])
    assert export(write(tokenizer), tmp_path / "out.gguf", "--format", "gguf") == 1
    message = r'the tokenizer bpe with {"pre_tokenizer": ["\\w+|\\W"]}, which llama.cpp lacks; pass'
    assert message in capsys.readouterr().err


def test_a_base_model_continues_its_prompt_in_ollama(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export(write(), tmp_path / "out.gguf", "--format", "gguf")
    assert (tmp_path / "out.Modelfile").read_text("utf-8").splitlines() == [
        "FROM ./out.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        "PARAMETER num_ctx 64",
    ]


def test_ollama_is_given_the_chat_template_and_what_ends_a_reply(
    write: Write, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    export(write(template="alpaca"), tmp_path / "out.f16", "--format", "gguf")
    assert (tmp_path / "out.f16.Modelfile").read_text("utf-8") == (
        "FROM ./out.f16\n"
        'TEMPLATE """<|endoftext|>{{ if not .System }}Below is an instruction that describes a '
        "task. Write a response that appropriately completes the request.\n\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}\n\n{{ end }}'
        '{{ if eq .Role "user" }}### Instruction:\n{{ .Content }}\n\n{{ end }}'
        '{{ if eq .Role "assistant" }}### Response:\n{{ .Content }}<|endoftext|>{{ end }}'
        '{{ end }}### Response:\n"""\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "\n### Instruction:"\n'
        "PARAMETER num_ctx 64\n"
    )


def test_the_template_of_a_published_model_is_left_to_ollama(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    checkpoint = write(published(tmp_path / "there"), template="published")
    export(checkpoint, tmp_path / "out.gguf", "--format", "gguf")
    lines = (tmp_path / "out.Modelfile").read_text("utf-8").splitlines()
    assert lines[1].startswith("# TEMPLATE: ")
    assert lines[2:4] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"']


def test_a_modelfile_needs_overwrite_and_another_file_is_kept(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    checkpoint, modelfile = write(), tmp_path / "out.Modelfile"
    modelfile.write_text("FROM ./old.gguf\n")
    assert export(checkpoint, tmp_path / "out.gguf", "--format", "gguf") == 1
    assert "out.Modelfile exists; pass another path, or --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()
    assert export(checkpoint, tmp_path / "out.gguf", "--format", "gguf", "--overwrite") == 0
    assert "FROM ./out.gguf" in modelfile.read_text()


def test_a_missing_package_is_named(
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert export(write(), tmp_path / "out.gguf", "--format", "gguf") == 1
    assert "pip install -e '.[gguf]'" in capsys.readouterr().err
