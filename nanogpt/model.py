"""GPT-2 exactly as published, with a few switches for small models that learn faster.

Module and tensor names are those of the published weights.
Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-5
INIT_STD = 0.02
ROTARY_BASE = 10_000.0
WRITTEN_OUT_TOKENS = 256  # longest context for which the scores (B, H, T, T) are kept
PADDED_FROM_TOKENS = 8192  # smallest vocabulary whose padding pays
DROPOUT_SITES = 3  # of a layer: its attention weights and its two branches

# "Language Models are Unsupervised Multitask Learners", table 2.
PRESETS = {  # n_layer, n_head, n_embd
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 small.

    `block` is the dotted path of a class that replaces `Block`, whose docstring is the contract.
    Raises ValueError, naming the key, for a value that no model can have.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    position: Literal["learned", "rotary"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    activation: Literal["gelu", "relu2"] = "gelu"
    qk_norm: bool = False
    zero_init: bool = False
    block: str | None = None

    def __post_init__(self) -> None:
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise ValueError(f"{key}={value!r} is not a whole number of at least 1")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout!r} is not a number from 0 up to, not including, 1"
            )
        for key in ("bias", "qk_norm", "zero_init"):
            value = getattr(self, key)
            if type(value) is not bool:
                raise ValueError(f"{key}={value!r} is neither true nor false")
        for key, known in (
            ("position", ("learned", "rotary")),
            ("norm", ("layernorm", "rmsnorm")),
            ("activation", ("gelu", "relu2")),
        ):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"{key}={value!r} is unknown; choose one of {', '.join(known)}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} equal heads; "
                f"make n_embd a multiple of n_head"
            )
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"position=rotary turns pairs of channels but n_embd={self.n_embd} over "
                f"n_head={self.n_head} gives an odd head size; make it even"
            )
        if self.block is not None and not is_class_path(self.block):
            raise ValueError(
                f"block={self.block!r} is not the dotted path of a class, my_package.MyBlock"
            )

    def record(self) -> dict[str, Any]:
        """Return the plain values that a checkpoint holds, without `block` where it is null.

        Versions that lack the key read the models that they can build.
        """
        values = asdict(self)
        if self.block is None:
            del values["block"]
        return values

    @classmethod
    def preset(cls, name: str) -> "GPTConfig":
        """Return a published shape: gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        n_layer, n_head, n_embd = PRESETS[name]
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


class Cache(Protocol):
    """What the model needs of a KV cache: how many tokens it holds, and a way to add more."""

    @property
    def length(self) -> int: ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values (B, H, T, D); return all of them, old and new."""
        ...


class GPT(nn.Module):
    """A decoder-only transformer whose head shares the token embedding.

    It holds no state between calls: what was read before comes in as a `cache`. Raises ValueError
    where the class that `config.block` names cannot be a block.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = TokenEmbedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(build_blocks(config))
        # A subclass may mix tokens in other ways than its base class does: it opts in by itself.
        self.uses_cache = config.block is None or vars(type(self.h[0])).get("uses_cache") is True
        self.ln_f = make_norm(config)
        self.init_weights()

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str]) -> "GPT":
        """Read a local Hugging Face GPT-2 directory."""
        from nanogpt.pretrained import load_pretrained

        return load_pretrained(path)

    def forward(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        row_seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of the token that follows each of input_ids (B, T)."""
        return self.head(self.hidden_states(input_ids, cache, documents, row_seeds))

    def hidden_states(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        row_seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the final, normalised states (B, T, C) of input_ids (B, T) int64.

        With a cache, input_ids continue what it holds, without dropout. Where rows are packed,
        documents (B, T) int64 number the text that each token is of: attention stays among equal
        numbers, and positions begin at 0 with each. In training, row_seeds (B,) int64 determine
        what dropout drops of each row; by default they are drawn from torch's generator. Raises
        ValueError past block_size, and for a cache where the model's blocks use none.
        """
        assert cache is None or documents is None, "packed rows are not continued"
        config = self.config
        if cache is not None and not self.uses_cache:
            raise ValueError(
                f"model.block={config.block} does not use a cache: its class lacks uses_cache = "
                f"True; pass the whole input without a cache"
            )
        start = 0 if cache is None else cache.length
        end = start + input_ids.size(1)
        if end > config.block_size:
            raise ValueError(
                f"the input reaches {end} tokens but the model has block_size={config.block_size}; "
                f"shorten it"
            )
        x = self.wte(input_ids)  # (B, T, C)
        if documents is None:
            positions, mask = torch.arange(start, end, device=x.device), None  # (T,)
        else:
            positions, mask = positions_within(documents), document_mask(documents)
        rotation = None
        if config.position == "learned":
            x = x + (self.wpe.weight[start:end] if documents is None else self.wpe(positions))
        else:
            rotation = rotary_angles(positions, config.n_embd // config.n_head)
        rate = config.dropout if self.training and cache is None else 0.0
        if rate and row_seeds is None:
            row_seeds = torch.randint(2**63 - 1, x.shape[:1], device=x.device)
        dropout = RowDropout(rate, row_seeds)
        x = dropout(x, DROPOUT_SITES * config.n_layer)
        for block in self.h:
            x = block(x, rotation, cache, mask, dropout)
        return self.ln_f(x)

    def head(self, hidden_states: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., C)."""
        return self.wte.logits(hidden_states)

    def num_parameters(self) -> int:
        """Count the parameters: the tied head once, padded rows not at all."""
        padding = self.wte.weight.size(0) - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every weight anew, as GPT-2 did.

        Normal with deviation 0.02, biases zero; projections onto the residual stream are scaled by
        1/sqrt(number of them) (GPT-2 paper, section 2.3), or start at zero with `zero_init`. Of
        blocks of another class only the linear layers are drawn, those named `c_proj` as
        projections onto the residual stream; other parameters keep what their constructors set.
        """
        config = self.config
        kept = set() if config.block is None else self._constructed()
        residual_std = 0.0 if config.zero_init else INIT_STD / math.sqrt(2 * config.n_layer)
        for name, parameter in self.named_parameters():
            if name in kept:
                continue
            if name == "wte.weight":
                nn.init.normal_(parameter[: config.vocab_size], std=INIT_STD)
                nn.init.zeros_(parameter[config.vocab_size :])
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STD)
            else:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)

    def _constructed(self) -> set[str]:
        """Return the names of the blocks' parameters that are not of linear layers."""
        names = {f"h.{name}" for name, _ in self.h.named_parameters()}
        for path, module in self.h.named_modules(prefix="h"):
            if isinstance(module, nn.Linear):
                names -= {f"{path}.weight", f"{path}.bias"}
        return names


class TokenEmbedding(nn.Module):
    """The token table, also the head: large ones have a few more rows in memory than tokens.

    Matrix products are faster over a multiple of 64 rows. The rows beyond `vocab_size` stay zero,
    and neither logits nor state dict show them.
    """

    def __init__(self, vocab_size: int, n_embd: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        padded = vocab_size > PADDED_FROM_TOKENS
        n_rows = math.ceil(vocab_size / 64) * 64 if padded else vocab_size
        self.weight = nn.Parameter(torch.zeros(n_rows, n_embd))
        self.register_state_dict_post_hook(_drop_padding)
        self.register_load_state_dict_pre_hook(_add_padding)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows (B, T, C) of input_ids (B, T)."""
        return F.embedding(input_ids, self.weight)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the product (..., V) of hidden states (..., C) with every row."""
        return F.linear(hidden_states, self.weight)[..., : self.vocab_size]


class RowDropout:
    """Dropout whose masks depend on each row's seed alone, however the rows are batched.

    Of the n elements of a token, number i is dropped where the product of two odd 32-bit integers,
    one hashed from the token and one from i, is among the smallest: products of random odd integers
    are uniform and, in pairs, as good as independent (multiplicative hashing, Dietzfelbinger et
    al., "A Reliable Randomized Algorithm for the Closest-Pair Problem", 1997). So a mask costs a
    multiplication and a comparison per element, on any device, eager or compiled.
    """

    def __init__(self, rate: float, row_seeds: Tensor | None) -> None:
        self.rate = rate
        self.row_seeds = row_seeds  # (B,) int64, where the rate is above 0

    def __call__(self, x: Tensor, site: int) -> Tensor:
        """Drop elements of x (B, T, C) or (B, H, T, T) and scale the others to the same mean.

        Every site of a model has masks of its own. Elements beyond a row's last token change none
        of those before.
        """
        if not self.rate:
            return x
        B, H, T, n = (x if x.dim() == 4 else x[:, None]).shape
        of_token = self._integers(2 * site, T * H).view(B, T, H).mT.contiguous()  # (B, H, T)
        of_element = self._integers(2 * site + 1, n)  # (B, n)
        products = of_token[..., None] * of_element[:, None, None]  # (B, H, T, n)
        kept = products >= int(2**32 * self.rate) - 2**31
        return x * kept.view_as(x) * (1 / (1 - self.rate))

    def _integers(self, stream: int, n: int) -> Tensor:
        """Return the first n odd integers (B, n) int32 of a stream of each row.

        They are upper halves of SplitMix64 (Steele et al., 2014). Its shifts are arithmetic here,
        which costs a bit or two of the 64.
        """
        assert self.row_seeds is not None
        places = torch.arange(n, device=self.row_seeds.device)
        z = (self.row_seeds[:, None] + (stream << 32) + places) * -0x61C8864680B583EB
        z = (z ^ (z >> 30)) * -0x40A7B892E31B1A47
        z = (z ^ (z >> 27)) * -0x6B2FB644ECCEEE15
        return (z >> 32).int() | 1


NO_DROPOUT = RowDropout(0.0, None)


class Block(nn.Module):
    """Attention, then a perceptron, each on a normalised copy of the residual stream.

    `model.block=my_package.MyBlock` replaces it by an `nn.Module` class with this constructor and
    this `forward`. A subclass may replace `attn` or `mlp` alone:

        class MyBlock(Block):
            def __init__(self, config, layer):
                super().__init__(config, layer)
                self.mlp = SwiGLU(config.n_embd)  # (B, T, C) to (B, T, C)

    The output of a token may depend on that token and those before it only. Forward receives, by
    position, and returns the new residual stream (B, T, C):

    - x (B, T, C): the residual stream.
    - rotation (2, ..., T, 1, D/2) for `rotate`; None with position=learned.
    - cache: None but in generation, and only where the class itself sets `uses_cache = True`, which
      subclasses do not inherit. `cache.update(layer, k, v)` is then called once in each forward;
      x holds the new tokens alone, which follow the `cache.length` earlier ones, and no other part
      of the block may mix tokens.
    - mask (B, 1, T, T) bool: which keys each query may see, where rows are packed from documents;
      None for causal attention. Attention that disregards it reads across documents.
    - dropout: a `RowDropout`, called as dropout(x, site), with sites from 3 * layer to
      3 * layer + 2. Its masks depend on the row's seed and the site only, so that micro-batches and
      resumed runs drop alike; `nn.Dropout` draws from torch's generator instead.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        dropout: RowDropout = NO_DROPOUT,
    ) -> Tensor:
        site = DROPOUT_SITES * self.layer
        x = x + dropout(self.attn(self.ln_1(x), rotation, cache, mask, dropout), site + 1)
        return x + dropout(self.mlp(self.ln_2(x)), site + 2)


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        dropout: RowDropout = NO_DROPOUT,
    ) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x, rotation))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        drop = partial(dropout, site=DROPOUT_SITES * self.layer) if dropout.rate else None
        y = causal_attention(q, k, v, mask, drop)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def qkv(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values (..., H, D) of normalised states (..., C)."""
        H = self.config.n_head
        q, k, v = self.c_attn(x).unflatten(-1, (3, H, -1)).unbind(-3)
        if self.config.qk_norm:
            norm = F.rms_norm if self.config.norm == "rmsnorm" else F.layer_norm
            q, k = (norm(part, part.shape[-1:], eps=NORM_EPSILON) for part in (q, k))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v


class MLP(nn.Module):
    """Two linear maps with a nonlinearity between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        relu2 = self.config.activation == "relu2"
        x = F.relu(x).square() if relu2 else F.gelu(x, approximate="tanh")
        return self.c_proj(x)


def is_class_path(path: object) -> bool:
    """Return whether a value is the dotted path of a class: a module and a name in it."""
    return isinstance(path, str) and "." in path and all(map(str.isidentifier, path.split(".")))


def import_block(path: str) -> type[nn.Module]:
    """Import the class of a block, which runs the code of its module.

    Raises ValueError where it cannot be imported, is no `nn.Module` class, or its forward does not
    take the arguments of `Block.forward`.
    """
    module, _, name = path.rpartition(".")
    try:
        block = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"model.block={path} cannot be imported ({reason})") from error
    if not (isinstance(block, type) and issubclass(block, nn.Module)):
        raise ValueError(f"model.block={path} is not a subclass of torch.nn.Module")
    names = list(inspect.signature(Block.forward).parameters)
    try:
        inspect.signature(block.forward).bind(*names)
    except TypeError as error:
        raise ValueError(
            f"model.block={path} has a forward that does not take {', '.join(names[1:])} by "
            f"position ({error})"
        ) from error
    return block


def build_blocks(config: GPTConfig) -> list[nn.Module]:
    """Return the blocks of a model; raise ValueError where `config.block` cannot be one."""
    if config.block is None:
        return [Block(config, layer) for layer in range(config.n_layer)]
    block = import_block(config.block)
    try:
        return [block(config, layer) for layer in range(config.n_layer)]
    except Exception as error:  # whatever the constructor raises
        raise ValueError(
            f"model.block={config.block} cannot be constructed from a GPTConfig and the number of "
            f"its layer ({type(error).__name__}: {error})"
        ) from error


def make_norm(config: GPTConfig) -> nn.Module:
    """Return a new normalisation over channels."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=NORM_EPSILON)
    return nn.LayerNorm(config.n_embd, eps=NORM_EPSILON, bias=config.bias)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Let each query (B, H, T, D) gather from the keys up to its own, the last one from all.

    A mask (B, 1, T, T) of booleans says instead which keys each query gathers from. `drop` is
    applied to the attention weights (B, H, T, T), which are then kept for the backward: fused
    kernels draw dropout of their own.
    """
    if drop is not None:
        return written_out_attention(q, k, v, mask, drop)
    n_queries, n_keys = q.size(2), k.size(2)
    if n_queries < n_keys:  # where is_causal would align the queries with the first keys
        if n_queries > 1:
            mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device)
            mask = mask.tril(n_keys - n_queries)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if q.is_cpu and q.dtype == torch.bfloat16 and n_keys <= WRITTEN_OUT_TOKENS:
        return written_out_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def written_out_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v over the past (B, H, T, D), as two batched products.

    On a CPU, in bfloat16 and for a short context, the fused kernel takes more than four times as
    long: 23 against 5 ms (forward and backward, B=16, H=4, T=128, D=64, one core of an AMD EPYC).
    """
    B, H, T, D = q.shape
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    else:
        mask = mask.expand(-1, H, -1, -1).flatten(0, 1)  # (B*H, T, T)
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    keys = k.flatten(0, 1).transpose(1, 2)  # (B*H, D, T)
    scores = torch.baddbmm(hidden, q.flatten(0, 1), keys, alpha=D**-0.5)  # (B*H, T, T)
    weights = scores.softmax(-1)
    if drop is not None:
        weights = drop(weights.view(B, H, T, T)).flatten(0, 1)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)


def document_mask(documents: Tensor) -> Tensor:
    """Return which keys each query sees (B, 1, T, T): those up to its own, of its own document."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def positions_within(documents: Tensor) -> Tensor:
    """Return each token's distance (B, T) from the first of its document (B, T), a run of equals.

    >>> positions_within(torch.tensor([[0, 0, 0, 1, 1, 2]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    places = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    return places - places.where(begins, 0).cummax(dim=1).values


def rotary_angles(positions: Tensor, head_size: int) -> Tensor:
    """Return cosine and sine (2, ..., T, 1, D/2) of positions' angles (RoFormer, section 3.2.2).

    They are computed for each call, in float32, and not kept: it costs microseconds, and a model
    has no buffers to lose or to round when it moves to another device or precision.
    """
    channels = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    speeds = ROTARY_BASE ** (-channels / head_size)  # (D/2,)
    angles = positions[..., None, None].float() * speeds  # (..., T, 1, D/2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of x (B, T, H, D) by their position's angle."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def _drop_padding(module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"][: module.vocab_size]


def _add_padding(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    weight = state_dict.get(f"{prefix}weight")
    n_missing = module.weight.size(0) - module.vocab_size
    if n_missing and weight is not None and weight.size(0) == module.vocab_size:
        state_dict[f"{prefix}weight"] = F.pad(weight, (0, 0, 0, n_missing))
