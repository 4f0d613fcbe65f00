"""The model equals transformers' GPT-2 on the same weights; what is not a GPT-2 is refused."""

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt.checkpoint import find_init_from, init_model, with_config
from nanogpt.model import GPT, PRESETS
from nanogpt.pretrained import fetch_pretrained, load_pretrained
from nanogpt.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, bpe_tokenizer, byte_tokenizer
from nanogpt.tokenizer_files import write_tokenizer

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
        gradient, expected = parameter.grad, expected_gradients[name].grad
        assert gradient is not None
        assert expected is not None
        expected = expected.t() if name.endswith(CONV1D) else expected
        assert (gradient - expected).abs().max() <= 1e-5, name


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


def as_those_of_old(directory: Path, tensors: dict[str, Tensor]) -> None:
    """As the first published files: no prefix, causal masks among the tensors, no head."""
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(SHAPE["n_layer"]):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, directory / "model.safetensors")


def as_one_with_a_head(directory: Path, tensors: dict[str, Tensor]) -> None:
    head = tensors["transformer.wte.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors")


def as_half_precision(directory: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    "write", [as_shards, as_those_of_old, as_one_with_a_head, as_half_precision]
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
        ({"model_type": "bloom"}, "model_type='bloom'; only gpt2, .*, nanochat can be read"),
        ({"model_type": "llama"}, r"config\.json cannot be read: lacks .*max_position_embeddings"),
        ({"rope_scaling": "x"}, r"config\.json cannot be read: "),
        ({"activation_function": "relu"}, "activation_function='relu'; only 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "only False can be read"),
        ({"tie_word_embeddings": False}, r"Missing key.*lm_head\.weight"),
        ({"layer_norm_epsilon": "1e-6"}, "norm_eps='1e-6' should be a number"),
        ({"n_inner": 100}, r"size mismatch for h\.0\.mlp\.c_fc\.weight"),
        ({"n_head": 5}, "n_embd=48 should be a multiple of n_head=5"),
        ({"n_layer": 2}, "has weights of 3 layers and n_layer=2, which its config.json describes"),
        ({"n_layer": 4}, "has weights of 3 layers and n_layer=4"),
        ({"vocab_size": 98}, r"wte\.weight: .*\[97, 48\].*\[98, 48\]"),
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
    with pytest.raises(ValueError, match=r"lm_head\.weight in .* set it to false"):
        load_pretrained(directory)


def test_rows_that_cannot_be_joined_are_refused(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {**tensors, "transformer.ln_f.bias": torch.tensor(1.0)}, directory / "model.safetensors"
    )
    with pytest.raises(ValueError, match="has weights of wrong shapes: zero-dimensional"):
        load_pretrained(directory)


def test_missing_files_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.config\.json does not exist"):
        load_pretrained(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors; pass"):
        load_pretrained(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_named(name: str, directory: Path) -> None:
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name} is .*; remove it and fetch it again"):
        load_pretrained(directory)


def test_a_pickle_is_refused(reference: GPT2LMHeadModel, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(reference.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickle, such as pytorch_model\.bin, is not read"):
        load_pretrained(directory)


# Fetching by name


@dataclass
class Hub:
    """A hub on this machine that has the files of openai-community/gpt2."""

    files: Path
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    breaks_at: int | None = None  # the byte of a file before which connections break


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like that of published weights: GPT-2's vocabulary size, but tiny."""
    directory = tmp_path_factory.mktemp("published")
    shape = {**SHAPE, "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 50257}
    GPT2LMHeadModel(GPT2Config(**{**shape, "n_positions": 1024}, **SPECIAL)).save_pretrained(
        directory
    )
    pairs = [bytes(pair) for pair in product(range(256), repeat=2)][:50_000]
    tokens = [*(bytes([i]) for i in range(256)), *pairs]
    tokenizer = Tokenizer("bpe", GPT2_PATTERN, tokens, [END_OF_TEXT])
    write_tokenizer(tokenizer, directory, block_size=1024)
    return directory


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that huggingface_hub talks to, with a tiny model under the name gpt2."""
    monkeypatch.setitem(PRESETS, "gpt2", (2, 2, 8))
    hub = Hub(published)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/resolve/main/")[2]
            byte_range = self.headers.get("Range")
            hub.requests.append((self.command, name, byte_range))
            if not (hub.files / name).is_file():
                return self.send_error(404)
            content = (hub.files / name).read_bytes()
            start = int(byte_range.removeprefix("bytes=").split("-")[0]) if byte_range else 0
            self.send_response(206 if byte_range else 200)
            self.send_header("ETag", '"' + name.encode().hex().ljust(40, "0")[:40] + '"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if byte_range:
                range_ = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", range_)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[start : hub.breaks_at])
            return None

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's attempts
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_published_weights_are_fetched_once(
    hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = fetch_pretrained("gpt2", tmp_path)
    assert directory == tmp_path / "weights" / "gpt2"
    for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        assert (directory / name).read_bytes() == (published / name).read_bytes()
    offline(monkeypatch)
    n_requests = len(hub.requests)
    assert find_init_from("gpt2", tmp_path / "runs", tmp_path) == directory
    assert len(hub.requests) == n_requests


def test_a_model_of_the_hub_is_fetched_by_its_name(
    hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, Path]] = []

    def snapshot_download(name: str, local_dir: Path, allow_patterns: Any) -> None:
        fetched.append((name, local_dir))
        shutil.copytree(published, local_dir)
        (local_dir / "tokenizer.json").touch()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    where = (tmp_path / "runs", tmp_path)
    directory = find_init_from("owner/model-1", *where)
    assert fetched == [("owner/model-1", directory)]
    assert directory == tmp_path / "weights" / "owner--model-1"
    offline(monkeypatch)
    assert find_init_from("owner/model-1", *where) == directory
    with pytest.raises(ConnectionError, match=r"the model owner/other cannot be fetched: .*; copy"):
        find_init_from("owner/other", *where)
    (tmp_path / "runs" / "sweep").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint 'sweep/lr=1'"):
        find_init_from("sweep/lr=1", *where)


def test_a_directory_that_was_copied_here_needs_no_network(
    hub: Hub, published: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "weights" / "gpt2"
    copy.parent.mkdir()
    copy.symlink_to(published)
    assert fetch_pretrained("gpt2", tmp_path) == copy
    assert not hub.requests


def test_the_error_without_a_network_names_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    with pytest.raises(ConnectionError) as caught:
        find_init_from("gpt2-medium", tmp_path / "runs", tmp_path)
    assert str(caught.value) == (
        "the weights of openai-community/gpt2-medium cannot be fetched: HF_HUB_OFFLINE is set; run "
        f"python -m nanogpt.prepare gpt2-medium on a connected machine and copy its "
        f"{tmp_path / 'weights' / 'gpt2-medium'} here, or pass the path of a local Hugging "
        "Face directory"
    )


def test_a_download_that_broke_off_is_continued(hub: Hub, tmp_path: Path) -> None:
    hub.breaks_at = 1000
    with pytest.raises(ConnectionError, match=r"fetching .* broke off .*same command continues it"):
        fetch_pretrained("gpt2", tmp_path)
    assert not (tmp_path / "weights" / "gpt2" / "model.safetensors").exists()
    hub.breaks_at = None
    hub.requests.clear()
    fetch_pretrained("gpt2", tmp_path)
    assert ("GET", "config.json", None) not in hub.requests  # it was whole


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt", "model.safetensors"])
def test_half_a_file_is_named_and_fetched_once_it_is_removed(
    name: str, hub: Hub, tmp_path: Path
) -> None:
    path = fetch_pretrained("gpt2", tmp_path) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name} .*; remove it and fetch it again"):
        init_model(fetch_pretrained("gpt2", tmp_path))
    path.unlink()
    fetch_pretrained("gpt2", tmp_path)
    assert path.read_bytes() == whole


def test_other_weights_under_the_name_are_refused(
    hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "gpt2", (3, 2, 8))
    with pytest.raises(
        ValueError, match=r"n_layer=2.* but gpt2 is .*n_layer=3.*; remove the directory"
    ):
        fetch_pretrained("gpt2", tmp_path)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, or OWNER/NAME of"
    ):
        find_init_from("gpt3", tmp_path, tmp_path)


# Starting from a directory


def test_the_tokenizer_comes_from_the_folder_of_the_weights(
    directory: Path, tmp_path: Path
) -> None:
    tokenizer = bpe_tokenizer(["the cat sat on the mat " * 9], 280)
    shape = {**SHAPE, "vocab_size": tokenizer.vocab_size}
    GPT2LMHeadModel(GPT2Config(**shape, **SPECIAL)).save_pretrained(tmp_path / "own")
    write_tokenizer(tokenizer, tmp_path / "own", block_size=32)
    assert init_model(tmp_path / "own").tokenizer.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_of_another_vocabulary_is_refused(directory: Path) -> None:
    write_tokenizer(byte_tokenizer(), directory, block_size=32)
    with pytest.raises(ValueError, match="vocab_size=97 and the tokenizer byte with 273 ids"):
        init_model(directory)


def test_a_shorter_block_size_cuts_the_positions(
    reference: GPT2LMHeadModel, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanogpt.checkpoint.read_tokenizer", lambda *_: Vocabulary())
    start = with_config(init_model(directory), block_size=8)
    assert start.config.block_size == start.model.config.block_size == 8
    assert start.model.wpe.weight.shape == (8, 48)
    ids = some_ids()[:, :8]
    assert (start.model.eval()(ids) - reference(ids).logits).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="block_size=8"):
        start.model(some_ids()[:, :9])


class Vocabulary:
    """The part of a tokenizer that a start needs."""

    name, vocab_size, chat_template = "stub", 97, None
