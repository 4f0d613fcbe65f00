"""The model equals transformers' GPT-2 on the same weights; what is not a GPT-2 is refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt.model import GPT
from nanogpt.pretrained import load_pretrained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import GPT2Config, GPT2LMHeadModel

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "n_positions": 32,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    """A tiny GPT-2 whose every tensor, biases and norms too, is random."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, **NO_DROPOUT, **SPECIAL))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def directory(reference: GPT2LMHeadModel, tmp_path: Path) -> Path:
    """The reference as transformers saves it."""
    reference.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def change_config(directory: Path) -> Callable[..., None]:
    """Change keys of the saved config.json."""

    def change(**values: Any) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def some_ids() -> Tensor:
    return torch.randint(97, (3, 33), generator=torch.Generator().manual_seed(1))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_logits_and_gradients_equal_the_reference(
    reference: GPT2LMHeadModel, directory: Path
) -> None:
    model = GPT.from_pretrained(directory)
    inputs, targets = some_ids()[:, :-1], some_ids()[:, 1:]
    logits, expected = model(inputs), reference(inputs).logits
    assert (logits - expected).abs().max() <= 1e-5

    loss_of(logits, targets).backward()
    reference.zero_grad()
    loss_of(expected, targets).backward()
    expected_gradients = dict(reference.transformer.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, wanted = parameter.grad, expected_gradients[name].grad
        assert gradient is not None
        assert wanted is not None
        wanted = wanted.t() if name.endswith(CONV1D) else wanted
        assert (gradient - wanted).abs().max() <= 1e-5, name


def test_a_loaded_model_trains_and_owns_its_memory(directory: Path) -> None:
    model = load_pretrained(directory)
    before = (directory / "model.safetensors").read_bytes()
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter.is_contiguous()
        parameter.data.zero_()
    assert (directory / "model.safetensors").read_bytes() == before


def test_a_large_vocabulary_is_read(tmp_path: Path) -> None:
    shape = {**SHAPE, "vocab_size": 8201, "n_layer": 1, "n_embd": 8}
    reference = GPT2LMHeadModel(GPT2Config(**shape, **SPECIAL)).eval()
    reference.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path).eval()
    ids = some_ids()[:, :-1]
    assert model(ids).shape == (3, 32, 8201)
    assert (model(ids) - reference(ids).logits).abs().max() <= 1e-5
    assert model.config.dropout == 0.1


def as_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_pickle_of_old(directory: Path, tensors: dict[str, Tensor]) -> None:
    """As the first published files: no prefix, causal masks among the tensors, no head."""
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(SHAPE["n_layer"]):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(old, directory / "pytorch_model.bin")


def as_pickle_with_head(directory: Path, tensors: dict[str, Tensor]) -> None:
    head = tensors["transformer.wte.weight"]
    torch.save({**tensors, "lm_head.weight": head}, directory / "pytorch_model.bin")


def as_half_precision(directory: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    "write", [as_shards, as_pickle_of_old, as_pickle_with_head, as_half_precision]
)
def test_every_layout_of_the_files_is_read(
    write: Callable[[Path, dict[str, Tensor]], None], reference: GPT2LMHeadModel, directory: Path
) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write(directory, tensors)
    model, ids = load_pretrained(directory), some_ids()[:, :-1]
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    tolerance = 0.05 if write is as_half_precision else 1e-5
    assert (model(ids) - reference(ids).logits).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'; only 'gpt2' can be read"),
        ({"activation_function": "relu"}, "activation_function='relu'; only 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "only False can be read"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False; only True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06; only 1e-05"),
        ({"n_inner": 100}, "n_inner=100; only 192"),
        ({"n_head": 5}, "n_embd=48 does not divide into n_head=5"),
        ({"n_layer": 2}, r"not known h\.2\.attn\.c_attn\.bias, .* and 9 more"),
        ({"n_layer": 4}, r"missing h\.3\.attn\.c_attn\.bias, .* and 9 more; not known none"),
        ({"vocab_size": 98}, r"wte\.weight .* has the shape \(97, 48\) .* says \(98, 48\)"),
    ],
    ids=str,
)
def test_what_is_not_our_gpt2_is_refused(
    values: dict[str, Any], message: str, directory: Path, change_config: Callable[..., None]
) -> None:
    change_config(**values)
    with pytest.raises(ValueError, match=message):
        load_pretrained(directory)


def test_an_untied_head_is_refused(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(97, 48)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match="only a tied head can be read"):
        load_pretrained(directory)


def test_missing_files_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.config\.json does not exist"):
        load_pretrained(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model"):
        load_pretrained(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_damaged_file_is_named(name: str, directory: Path) -> None:
    whole = (directory / name).read_bytes() if name != "pytorch_model.bin" else b"PK\3\4 not a zip"
    if name == "pytorch_model.bin":
        (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name} is .*fetch it again"):
        load_pretrained(directory)


class Malicious:
    """Runs code when unpickled, where that is allowed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of a weights file was run",))


def test_a_pickle_that_would_run_code_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"wte.weight": Malicious()}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_pretrained(directory)
