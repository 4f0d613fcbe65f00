"""The model is GPT-2 in every use: padded, cached, copied, compiled."""

import copy
import itertools
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from torch import Tensor

from nanogpt import model as model_module
from nanogpt.dropout import RowDropout
from nanogpt.generation import KVCache
from nanogpt.layers import RMSNorm, squared_relu
from nanogpt.model import (
    GPT,
    Attend,
    GPTConfig,
    causal_attention,
    document_mask,
    rotary_angles,
    rotary_speeds,
    rotate,
    written_out_attention,
)
from nanogpt.values import explain
from tests.configs import CONF, options

TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=16)
MODERN = replace(
    TINY,
    bias=False,
    position="rotary",
    norm="rmsnorm",
    activation="relu2",
    qk_norm=True,
)
PADDED = replace(TINY, vocab_size=8200)
SHIFTED = replace(MODERN, token_shift=True)
SHORTCUT = replace(MODERN, embd_shortcut=True)
EACH = [TINY, MODERN, SHIFTED, SHORTCUT]
BOTH = pytest.mark.parametrize("config", EACH, ids=["gpt2", "modern", "shifted", "shortcut"])


def build(config: GPTConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config).eval()
    if config.token_shift:
        torch.nn.init.normal_(model.shift)
    if config.embd_shortcut:
        torch.nn.init.normal_(model.kept)
        torch.nn.init.normal_(model.shortcut)
    return model


def some_ids(config: GPTConfig, *shape: int) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_sizes_are_exact(name: str, expected: int) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.num_parameters() == expected
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == expected


def node(file: str) -> tuple[str, dict[str, Any]]:
    """Return the class that a file of conf/model names, and its keys, with those it begins from."""
    values = yaml.safe_load((CONF / "model" / "gpt2_small.yaml").read_text())
    own = yaml.safe_load((CONF / "model" / f"{file}.yaml").read_text())
    assert own.pop("defaults", None) == (None if file == "gpt2_small" else ["gpt2_small", "_self_"])
    values |= own
    return values.pop("_target_"), values


@pytest.mark.parametrize(
    ("preset", "file"),
    [
        ("gpt2", "gpt2_small"),
        ("gpt2-medium", "gpt2_medium"),
        ("gpt2-large", "gpt2_large"),
        ("gpt2-xl", "gpt2_xl"),
    ],
)
def test_presets_equal_their_files(preset: str, file: str) -> None:
    _, values = node(file)
    assert GPTConfig(**values, vocab_size=50257) == GPTConfig.preset(preset)


@pytest.mark.parametrize("file", [file for file in options("model") if file != "auto"])
def test_every_file_names_every_key_and_builds(file: str) -> None:
    target, values = node(file)
    assert target == "nanogpt.model.GPTConfig"
    config = GPTConfig(vocab_size=300, **values)
    assert list(values) == [key for key in asdict(config) if key != "vocab_size"]
    with torch.device("meta"):
        assert GPT(config)(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, 300)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd=10 should be a multiple of n_head=4"),
        ({"n_layer": 0}, "n_layer=0 should be at least 1"),
        ({"block_size": "128"}, "block_size='128' should be a whole number"),
        ({"n_head": True}, "n_head=True should be a whole number"),
        ({"n_embd": 64.0}, "n_embd=64.0 should be a whole number"),
        ({"dropout": 1.0}, "dropout=1.0 should be below 1"),
        ({"dropout": "0.1"}, "dropout='0.1' should be a number"),
        ({"dropout": float("nan")}, "dropout=nan should be below 1"),
        ({"bias": 1}, "bias=1 should be true or false"),
        ({"position": "alibi"}, "position='alibi' should be 'learned' or 'rotary'"),
        ({"norm": None}, "norm=None should be 'layernorm'"),
        ({"activation": ["gelu"]}, r"activation=\['gelu'\] should be 'gelu'"),
        ({"position": "rotary", "n_embd": 12, "n_head": 4}, "odd head size"),
        ({"position": "rotary", "head_size": 15}, "odd head size, 15"),
        ({"n_head": 7}, "n_embd=768 should be a multiple of n_head=7"),
        ({"n_kv_head": 5}, "n_kv_head=5 should be a divisor of n_head=12"),
        ({"rope_scaling": [8.0, 1.0, 4.0]}, "rope_scaling.3 must be given"),
        ({"rope_scaling": [8.0, 4.0, 1.0, 8192]}, "high above low"),
        ({"qk_norm_weight": True}, "qk_norm_weight=True should be false without qk_norm"),
        ({"qk_norm": True, "qk_gain": 1.5}, "qk_gain=1.5 should be 1 without qk_norm_weight"),
    ],
)
def test_a_value_no_model_can_have_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GPTConfig(**values)
    assert re.search(message, explain(caught.value))


@BOTH
def test_norms_without_weights_compute_as_with_ones(config: GPTConfig) -> None:
    learned, plain = build(config), build(replace(config, norm_weight=False))
    ids = some_ids(config, 2, 16)
    assert torch.equal(plain(ids), learned(ids))
    assert not [name for name, _ in plain.named_parameters() if "ln_" in name]


@BOTH
def test_embeddings_are_normalised_before_the_first_block(config: GPTConfig) -> None:
    plain, normed = build(config), build(replace(config, embd_norm=True))
    assert normed.state_dict().keys() == plain.state_dict().keys()
    ids, positions = some_ids(config, 2, 16), torch.arange(16)
    before = Attend().before(ids)
    x = plain.embed(ids, positions, before)
    x = x if config.norm == "rmsnorm" else x - x.mean(-1, keepdim=True)
    expected = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    torch.testing.assert_close(normed.embed(ids, positions, before), expected)


def test_token_shift_adds_the_embedding_before_times_a_vector() -> None:
    model, ids = GPT(SHIFTED), some_ids(SHIFTED, 2, 16)
    assert model.shift.tolist() == [0.0] * 8 + [1.0] * 8
    torch.nn.init.normal_(model.shift)
    x, rows = model.embed(ids, torch.arange(16), Attend().before(ids)), model.wte.weight[ids]
    assert torch.equal(x[:, 0], rows[:, 0])
    torch.testing.assert_close(x[:, 1:], rows[:, 1:] + model.shift * rows[:, :-1])


def test_a_truncated_cache_shifts_by_the_token_that_is_left() -> None:
    model, ids = build(SHIFTED), some_ids(SHIFTED, 1, 16)
    cache = KVCache(model)
    model(ids, cache)
    cache.length = 5
    torch.testing.assert_close(model(ids[:, 5:9], cache), model(ids)[:, 5:9], atol=1e-5, rtol=0)


def test_the_input_of_each_layer_is_the_stream_and_the_embedding_by_its_factors() -> None:
    plain, model = build(MODERN), build(SHORTCUT)
    ids, positions = some_ids(MODERN, 2, 16), torch.arange(16)
    x = embeddings = model.embed(ids, positions, Attend().before(ids))
    for layer, block in enumerate(model.h):
        x = model.kept[layer] * x + model.shortcut[layer] * embeddings
        x = block(x, model.rotation(positions), Attend())
    torch.testing.assert_close(model.hidden_states(ids), model.ln_f(x), atol=1e-6, rtol=0)
    model.load_state_dict({**GPT(SHORTCUT).state_dict(), **plain.state_dict()})
    assert torch.equal(model(ids), plain(ids))  # as every model begins


def test_heads_of_a_given_size_need_not_divide_the_channels() -> None:
    config = replace(TINY, n_embd=30, n_head=4, head_size=8, position="rotary")
    assert GPT(config)(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, TINY.vocab_size)


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(ValueError, match="'gpt3' is unknown; choose one of gpt2, gpt2-medium"):
        GPTConfig.preset("gpt3")


def test_initialisation_is_gpt2s() -> None:
    config = replace(TINY, vocab_size=1000, n_layer=8, n_embd=128)
    for name, parameter in build(config).named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif parameter.dim() == 1:
            assert parameter.eq(1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


def test_zero_initialisation_makes_blocks_pass_their_input_on() -> None:
    model = build(replace(MODERN, zero_init=True))
    x = torch.randn(2, 5, 16)
    angles = rotary_angles(torch.arange(5), rotary_speeds(GPTConfig(n_head=1, n_embd=8)))
    assert torch.equal(model.h[0](x, angles, Attend()), x)


@BOTH
def test_a_later_token_changes_no_earlier_logits(config: GPTConfig) -> None:
    model, ids = build(config), some_ids(config, 2, 16)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@BOTH
@pytest.mark.parametrize("chunks", [[1] * 16, [5, 1, 4, 6], [1, 15], [16]], ids=str)
def test_cached_decoding_matches_full_forward(config: GPTConfig, chunks: list[int]) -> None:
    model, ids = build(config), some_ids(config, 2, 16)
    cache = KVCache(model, batch_size=2)
    logits = torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids), atol=1e-5, rtol=0)
    assert cache.length == 16


@BOTH
def test_forward_is_head_of_hidden_states(config: GPTConfig) -> None:
    model, ids = build(config), some_ids(config, 2, 7)
    hidden = model.hidden_states(ids)
    assert hidden.shape == (2, 7, 16)
    assert torch.equal(model.head(hidden), model(ids))


def test_input_beyond_the_context_is_refused() -> None:
    model = build(TINY)
    with pytest.raises(ValueError, match="reaches 17 tokens but the model has block_size=16"):
        model(some_ids(TINY, 1, 17))
    cache = KVCache(model)
    model(some_ids(TINY, 1, 16), cache)
    with pytest.raises(ValueError, match="reaches 17 tokens"):
        model(some_ids(TINY, 1, 1), cache)


def test_dropout_acts_in_training_only() -> None:
    model, ids = build(replace(TINY, dropout=0.5)), some_ids(TINY, 2, 16)
    assert torch.equal(model(ids), model(ids))
    torch.testing.assert_close(model(ids), build(TINY)(ids), atol=0, rtol=0)
    model.train()
    assert not torch.allclose(model(ids), model(ids))


def test_written_out_attention_is_the_fused_one() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    fused = causal_attention(q, k, v)
    torch.testing.assert_close(written_out_attention(q, k, v), fused)


@BOTH
def test_packed_rows_are_read_as_if_each_document_stood_alone(config: GPTConfig) -> None:
    model, ids = build(config), some_ids(config, 2, 16)
    documents = torch.tensor([[0] * 5 + [1] * 9 + [2] * 2, [0] * 16])
    packed = model(ids, documents=documents)
    alone = torch.cat([model(part) for part in ids[:1].split([5, 9, 2], dim=1)], dim=1)
    torch.testing.assert_close(packed[:1], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[1:], model(ids[1:]), atol=1e-5, rtol=0)


@BOTH
def test_the_gradient_of_packed_rows_is_that_of_their_documents(config: GPTConfig) -> None:
    model, ids = build(config), some_ids(config, 1, 16)
    documents = torch.tensor([[0] * 5 + [1] * 11])
    model(ids, documents=documents).square().sum().backward()
    packed = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    sum(model(part).square().sum() for part in ids.split([5, 11], dim=1)).backward()
    for one, other in zip(packed, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_written_out_attention_keeps_to_documents_as_the_fused_does() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    mask = document_mask(torch.tensor([[0] * 4 + [1] * 5, [0] * 8 + [1]]))
    fused = causal_attention(q, k, v, mask=mask)
    torch.testing.assert_close(written_out_attention(q, k, v, mask=mask), fused)


def test_attention_sums_the_values_by_the_weights_that_are_not_dropped() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    drop = partial(RowDropout(0.5, torch.tensor([1, 2])), site=0)
    scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(causal_attention(q, k, v, drop=drop), drop(scores.softmax(-1)) @ v)


# Dropout

SEEDS = torch.tensor([3, -5, 2**62])


def dropped(rate: float, *shape: int, site: int = 0, seeds: Tensor = SEEDS) -> Tensor:
    """Return where a mask of some shape (B, ...) is zero."""
    mask = RowDropout(rate, seeds[: shape[0]])(torch.ones(shape), site)
    assert torch.equal(mask.unique(), torch.tensor([0, 1 / (1 - rate)]))
    return mask == 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_of_every_row_token_and_element(rate: float) -> None:
    for shape in ((3, 300, 200), (3, 4, 120, 120)):
        mask = dropped(rate, *shape).double()
        deviation = (rate * (1 - rate)) ** 0.5
        for dims in itertools.combinations(range(mask.dim()), mask.dim() - 1):
            means = mask.mean(dims)
            n = mask.numel() / len(means)
            assert (means - rate).abs().max() < 5 * deviation / n**0.5
            assert means.std() < 1.5 * deviation / n**0.5 or len(means) < 5


def test_dropped_elements_are_independent() -> None:
    mask = dropped(0.5, 3, 256, 256).double() * 2 - 1
    n = 256
    for first, second in (
        (mask[0], mask[1]),  # rows
        (mask[0, 1:], mask[0, :-1]),  # neighbouring tokens
        (mask[0, :, 1:], mask[0, :, :-1]),  # neighbouring elements
        (mask[0], dropped(0.5, 3, n, n, site=1)[0].double() * 2 - 1),  # sites
        (mask[0], mask[0].T),
        (mask[0, 1:, 1:] * mask[0, :-1, :-1], mask[0, 1:, :-1] * mask[0, :-1, 1:]),  # rectangles
    ):
        assert (first * second).mean().abs() < 4 / n


def test_what_is_dropped_of_a_row_depends_on_its_seed_alone() -> None:
    for shape in ((8, 6), (2, 8, 8)):
        whole = dropped(0.5, 3, *shape)
        for i in range(3):
            assert torch.equal(dropped(0.5, 1, *shape, seeds=SEEDS[i : i + 1])[0], whole[i])


def test_padding_changes_nothing_of_what_is_dropped_before_it() -> None:
    assert torch.equal(dropped(0.5, 3, 8, 6)[:, :5], dropped(0.5, 3, 5, 6))
    assert torch.equal(dropped(0.5, 3, 2, 8, 8)[..., :5, :5], dropped(0.5, 3, 2, 5, 5))


@BOTH
def test_a_row_is_dropped_from_alike_in_any_batch(config: GPTConfig) -> None:
    model, ids = build(replace(config, dropout=0.5)).train(), some_ids(config, 3, 16)
    whole = model(ids, row_seeds=SEEDS)
    torch.testing.assert_close(model(ids[1:2], row_seeds=SEEDS[1:2])[0], whole[1])
    torch.testing.assert_close(model(ids[:, :9], row_seeds=SEEDS), whole[:, :9])
    assert not torch.allclose(model(ids, row_seeds=SEEDS + 1), whole)


def test_without_seeds_dropout_follows_torchs_generator() -> None:
    model, ids = build(replace(TINY, dropout=0.5)).train(), some_ids(TINY, 2, 16)
    torch.manual_seed(1)
    first, second = model(ids), model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)
    assert not torch.allclose(first, second)


def test_a_cache_is_continued_without_dropout() -> None:
    model, ids = build(replace(TINY, dropout=0.5)), some_ids(TINY, 1, 16)
    expected = model(ids)
    torch.testing.assert_close(model.train()(ids, KVCache(model)), expected)


def test_every_part_of_the_model_has_masks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[list[int]] = []
    integers = RowDropout._integers

    def noted(self: RowDropout, stream: int, n: int) -> Tensor:
        streams.append(integers(self, stream, 4)[0].tolist())
        return integers(self, stream, n)

    monkeypatch.setattr(RowDropout, "_integers", noted)
    config = replace(TINY, dropout=0.5)
    build(config).train()(some_ids(config, 1, 16))
    n_streams = 2 * (3 * config.n_layer + 1)
    assert len(streams) == len({tuple(stream) for stream in streams}) == n_streams


@torch.no_grad()
@pytest.mark.parametrize(("has_weight", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_states_are_normalised_in_the_precision_of_the_weight(
    monkeypatch: pytest.MonkeyPatch, has_weight: bool, dtype: torch.dtype
) -> None:
    dtypes: list[torch.dtype] = []

    def noted(x: Tensor, *args: Any) -> Tensor:
        dtypes.append(x.dtype)
        return x

    monkeypatch.setattr(F, "rms_norm", noted)
    states = torch.ones(2, 8, dtype=torch.bfloat16)
    assert RMSNorm(8, elementwise_affine=has_weight)(states).dtype == torch.bfloat16
    assert dtypes == [dtype]


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_normalises_with_the_bits_of_inference(
    has_weight: bool, dtype: torch.dtype
) -> None:
    norm = RMSNorm(24, 1e-5, has_weight)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected = norm(x)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("has_weight", [True, False])
def test_the_gradient_of_rmsnorm_is_that_of_its_finite_differences(has_weight: bool) -> None:
    norm = RMSNorm(7, 1e-5, has_weight, dtype=torch.float64)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, x.requires_grad_())
    assert torch.autograd.gradgradcheck(norm, x)


@pytest.mark.parametrize("layer", [RMSNorm(5, 1e-5), squared_relu])
def test_layers_have_gradients_of_single_rows_and_of_gradients(
    layer: Callable[[Tensor], Tensor],
) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    def loss(row: Tensor) -> Tensor:
        return layer(row).square().sum()

    def reference(row: Tensor) -> Tensor:
        own = F.rms_norm(row, (5,), eps=1e-5) if isinstance(layer, RMSNorm) else row.relu().square()
        return own.square().sum()

    rows = (torch.func.vmap(torch.func.grad(f))(x) for f in (loss, reference))
    torch.testing.assert_close(*rows)
    twice = (torch.autograd.functional.hessian(f, x[0]) for f in (loss, reference))
    torch.testing.assert_close(*twice)


def test_the_squared_relu_has_the_bits_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    x, slopes = (torch.randn(4, 33, generator=generator) for _ in range(2))
    x[0] = 0.0
    ours, autograds = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = squared_relu(ours), F.relu(autograds).square()
    for output in outputs:
        output.backward(slopes)
    assert torch.equal(*outputs)
    assert ours.grad is not None
    assert autograds.grad is not None
    assert torch.equal(ours.grad, autograds.grad)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_inductor_drops_the_same() -> None:
    x = torch.ones(3, 2, 8, 8)
    drop = partial(RowDropout(0.3, SEEDS), site=5)
    assert torch.equal(torch.compile(drop, fullgraph=True)(x) == 0, drop(x) == 0)


def test_a_compiled_model_drops_the_same() -> None:
    torch.manual_seed(0)
    model, ids = build(replace(TINY, dropout=0.5)).train(), some_ids(TINY, 3, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, row_seeds=SEEDS), model(ids, row_seeds=SEEDS))


@BOTH
def test_bfloat16_autocast_stays_near_float32(config: GPTConfig) -> None:
    model, ids = build(config), some_ids(config, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), model(ids), atol=0.02, rtol=0.02)


def test_rotated_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    angles = rotary_angles(torch.arange(40), rotary_speeds(GPTConfig(n_head=1, n_embd=8)))
    turned_q, turned_k = (
        rotate(q.expand(1, 40, 1, 8), angles),
        rotate(k.expand(1, 40, 1, 8), angles),
    )
    near = (turned_q[0, 7, 0] * turned_k[0, 4, 0]).sum()
    far = (turned_q[0, 39, 0] * turned_k[0, 36, 0]).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1).expand(1, 40, 1))


def test_only_large_odd_vocabularies_are_padded() -> None:
    rows = {
        size: GPT(replace(TINY, vocab_size=size)).wte.weight.size(0) for size in (61, 8200, 8256)
    }
    assert rows == {61: 61, 8200: 8256, 8256: 8256}


@pytest.fixture
def unpadded(monkeypatch: pytest.MonkeyPatch) -> GPT:
    """PADDED as it would be without padding."""
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "PADDED_FROM_TOKENS", 10_000)
        return build(PADDED)


def test_padding_changes_neither_weights_nor_logits_nor_gradients(unpadded: GPT) -> None:
    padded, ids = build(PADDED), some_ids(PADDED, 2, 16)
    assert padded.wte.weight.size(0) != unpadded.wte.weight.size(0)
    assert padded.num_parameters() == unpadded.num_parameters()
    for name, tensor in unpadded.state_dict().items():
        assert torch.equal(padded.state_dict()[name], tensor), name
    for model in (padded, unpadded):
        model(ids).logsumexp(-1).sum().backward()
    torch.testing.assert_close(padded(ids), unpadded(ids))
    gradient, expected = padded.wte.weight.grad, unpadded.wte.weight.grad
    assert gradient is not None
    assert expected is not None
    torch.testing.assert_close(gradient[: PADDED.vocab_size], expected)
    assert gradient[PADDED.vocab_size :].eq(0).all()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_state_dicts_pass_between_padded_and_unpadded(
    assign: bool, device: str, unpadded: GPT
) -> None:
    with torch.device(device):
        padded = GPT(PADDED)
    if device == "meta" and not assign:
        padded.to_empty(device="cpu")
    padded.eval().load_state_dict(unpadded.state_dict(), strict=True, assign=assign)
    ids = some_ids(PADDED, 1, 8)
    torch.testing.assert_close(padded(ids), unpadded(ids))
    assert padded.wte.weight[PADDED.vocab_size :].eq(0).all()
    assert all(parameter.requires_grad for parameter in padded.parameters())
    unpadded.load_state_dict(padded.state_dict(), strict=True)


def test_a_state_dict_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for wte\.weight"):
        GPT(PADDED).load_state_dict(GPT(replace(PADDED, vocab_size=8300)).state_dict())


def test_a_copy_keeps_the_padding_out_of_sight() -> None:
    duplicate = copy.deepcopy(GPT(PADDED))
    assert duplicate.state_dict()["wte.weight"].size(0) == 8200
    duplicate.load_state_dict(build(PADDED, seed=3).state_dict())


def test_state_dict_holds_published_names_and_no_buffers() -> None:
    names = set(build(TINY).state_dict())
    assert {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"} <= names
    assert {
        f"h.1.{part}.{kind}" for part in ("ln_1", "ln_2") for kind in ("weight", "bias")
    } <= names
    assert {
        f"h.0.{part}.{kind}"
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    } <= names
    assert len(names) == 4 + 2 * 12
    assert not list(GPT(MODERN).buffers())


@BOTH
def test_the_forward_is_one_graph(config: GPTConfig) -> None:
    model, ids = build(config), some_ids(config, 2, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


@pytest.mark.parametrize(
    ("is_cuda", "autocast", "expected"),
    [
        (True, torch.bfloat16, torch.bfloat16),
        (True, torch.float16, torch.float32),  # whose range the stream would leave
        (True, None, torch.float32),
        (False, torch.bfloat16, torch.float32),
    ],
)
def test_the_residual_stream_is_bfloat16_in_mixed_precision_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    is_cuda: bool,
    autocast: torch.dtype | None,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: autocast or torch.bfloat16)
    seen = []

    def run(block: torch.nn.Module, x: Tensor, *args: Any) -> Tensor:
        seen.append(x.dtype)
        return x.float()

    build(replace(TINY, n_layer=1)).hidden_states(some_ids(TINY, 1, 4), run=run)
    assert seen == [expected]
