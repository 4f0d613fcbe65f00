"""GPT-2 exactly as published, with a few switches for small models that learn faster.

Module and tensor names are those of the published weights.
Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""

import importlib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import field, fields
from os import PathLike
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import InitErrorDetails, PydanticCustomError
from torch import Tensor, nn

from nanogpt.dropout import NO_DROPOUT, RowDropout
from nanogpt.layers import RMSNorm, squared_relu
from nanogpt.values import CHECKED, BelowOne, Count, Flag, Positive, Text

INIT_STD = 0.02
WRITTEN_OUT_TOKENS = 512  # longest context for which the scores (B, H, T, T) are materialised
PADDED_FROM_TOKENS = 8192  # smallest vocabulary that gains from padding
RunBlock = Callable[..., Tensor]  # that of `run_block`

# "Language Models are Unsupervised Multitask Learners", table 2.
PRESETS = {  # n_layer, n_head, n_embd
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}

DERIVED = ("n_kv_head", "head_size", "n_inner")  # null: n_head, n_embd / n_head, 4 n_embd
# Fields that version 0.1.0 lacks, of which it computes the defaults.
LATER: tuple[str, ...] = ("rope_base", "norm_eps", "norm_weight", "embd_norm", "tie_embeddings")
LATER += ("qk_norm_weight", "qk_gain", "token_shift", "embd_shortcut")


@dataclass(frozen=True, config=CHECKED)
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 small.

    With `n_kv_head` below `n_head`, groups of query heads share keys and values (GQA, arXiv
    2305.13245). `n_inner` is the width of the MLP, which swiglu has twice (arXiv 2002.05202).
    `rope_scaling` stretches the rotary wavelengths as Llama 3.1 does: its factor, low and high
    frequency factor, and the context that it was trained with. `qk_gain` is the initial value of
    the queries' `qk_norm_weight`. `token_shift` adds to the embedding of each token that of the one
    before, times a learned vector (RWKV, arXiv 2305.13048, shifts the input of every layer).
    With `embd_shortcut` the input of each layer is a x + b x0, of the residual stream x and the
    embedding x0, with learned numbers a and b of the layer, at first 1 and 0 (modded-nanogpt).
    `logit_softcap` c bounds the logits x to c tanh(x / c). `block` is the dotted path of a class
    that replaces `Block`, whose docstring is the contract. Raises pydantic's ValidationError, a
    ValueError, for a value that no model can have.
    """

    block_size: Count = 1024
    vocab_size: Count = 50257
    n_layer: Count = 12
    n_head: Count = 12
    n_kv_head: Count | None = field(default=None, kw_only=True)
    head_size: Count | None = field(default=None, kw_only=True)
    n_embd: Count = 768
    n_inner: Count | None = None
    dropout: BelowOne = 0.0
    bias: Flag = True
    position: Literal["learned", "rotary"] = "learned"
    rope_base: Positive = 10_000.0
    rope_scaling: tuple[Positive, Positive, Positive, Count] | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: BelowOne = 1e-5
    norm_weight: Flag = True
    embd_norm: Flag = False
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"
    qk_norm: Flag = False
    qk_norm_weight: Flag = False
    qk_gain: Positive = 1.0
    token_shift: Flag = False
    embd_shortcut: Flag = False
    tie_embeddings: Flag = True
    logit_softcap: Positive | None = None
    zero_init: Flag = False
    block: Text | None = None

    def __post_init__(self) -> None:
        n_head, n_embd, scaling = self.n_head, self.n_embd, self.rope_scaling
        is_path = re.fullmatch(r"\w+(\.\w+)+", self.block or "a.b")
        D, turns = self.head_dim, self.position == "rotary"
        unmet: dict[str, Any] = {
            "n_embd": not self.head_size and n_embd % n_head and f"a multiple of n_head={n_head}",
            "n_kv_head": n_head % self.kv_heads and f"a divisor of n_head={n_head}",
            "rope_scaling": scaling
            and scaling[1] >= scaling[2]
            and "[factor, low, high above low, context]",
            "qk_norm_weight": self.qk_norm_weight > self.qk_norm and "false without qk_norm",
            "qk_gain": self.qk_gain != 1 and not self.qk_norm_weight and "1 without qk_norm_weight",
            "block": not is_path and "the dotted path of a class, my_package.MyBlock",
            "position": turns and D % 2 and f"learned with an odd head size, {D}",
        }
        for key in filter(unmet.get, unmet):
            kind, found = PydanticCustomError("value", unmet[key]), getattr(self, key)
            details = InitErrorDetails(type=kind, loc=(key,), input=found)
            raise ValidationError.from_exception_data("GPTConfig", [details])
        defaults = (n_head, n_embd // n_head, 4 * n_embd)
        for key, default in zip(DERIVED, defaults, strict=True):
            if getattr(self, key) == default:  # so that equal models have equal configurations
                object.__setattr__(self, key, None)

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """The channels of a head."""
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def inner_dim(self) -> int:
        """The channels inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def record(self) -> dict[str, Any]:
        """Return the plain values for a checkpoint, later fields only where they differ.

        Versions of this package that lack those fields can then read the checkpoint.
        """
        defaults = {one.name: one.default if one.name in LATER else None for one in fields(self)}
        values = {key: value for key, value in vars(self).items() if value != defaults[key]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def preset(cls, name: str) -> "GPTConfig":
        """Return a published shape; raise ValueError for another than those of PRESETS."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        n_layer, n_head, n_embd = PRESETS[name]
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


class Attend:
    """Causal attention of a batch of rows: the one part of a forward that mixes tokens.

    Training, packed rows, the KV cache, the scorer's trees of tokens and the server's slots run the
    same blocks and differ in this object. `mask` (B, 1, T, T) bool replaces the causal mask.
    """

    length = 0  # tokens before the input's first one

    def __init__(self, mask: Tensor | None = None, dropout: RowDropout | None = None) -> None:
        self.mask = mask
        self.dropout = dropout or NO_DROPOUT  # as a default value torch 2.11 could not compile it

    def of_layer(self, layer: int) -> "Attend":
        """Return the attention of a layer, which differs from this in the masks of its dropout."""
        return Attend(self.mask, self.dropout.of_layer(layer)) if self.dropout.rate else self

    def before(self, input_ids: Tensor) -> Tensor:
        """Return the id before each of input_ids (B, T); of a text's first token any id."""
        return F.pad(input_ids[:, :-1], (1, 0))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention output (B, T, H, D) of a layer's q, k and v (B, T, H, D) each."""
        drop = self.dropout if self.dropout.rate else None
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return causal_attention(q, k, v, self.mask, drop).transpose(1, 2)


def run_block(
    block: Any, x: Tensor, rotation: Tensor | None, attend: Attend, *mixed: Tensor
) -> Tensor:
    """Return the residual stream (B, T, C) after a block; compiled, all layers share one graph.

    Numbers a and b and embeddings x0 (B, T, C), where they are `mixed`, make its input a x + b x0.
    """
    if mixed:
        kept, shortcut, embeddings = mixed
        x = kept * x + shortcut * embeddings
    after: Tensor = block(x, rotation, attend)
    return after


class GPT(nn.Module):
    """A decoder-only transformer, whose head shares the token embedding where `tie_embeddings`.

    It holds no state between calls: the tokens before come in as a `cache`. Raises ValueError where
    the class that `config.block` names cannot be a block.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = TokenEmbedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.token_shift:
            self.shift = nn.Parameter((torch.arange(config.n_embd) >= config.n_embd // 2).float())
        if config.embd_shortcut:
            self.kept = nn.Parameter(torch.ones(config.n_layer))
            self.shortcut = nn.Parameter(torch.zeros(config.n_layer))
        self.ln_e = make_norm(config, config.n_embd, False) if config.embd_norm else nn.Identity()
        self.h = nn.ModuleList(build_blocks(config))
        self.ln_f = make_norm(config, config.n_embd, config.norm_weight)
        if not config.tie_embeddings:
            self.lm_head = TokenEmbedding(config.vocab_size, config.n_embd)
        self.init_weights()

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str]) -> "GPT":
        """Read a local Hugging Face GPT-2 directory."""
        from nanogpt.pretrained import load_pretrained

        return load_pretrained(path)

    def forward(
        self,
        input_ids: Tensor,
        cache: Attend | None = None,
        documents: Tensor | None = None,
        row_seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of the token that follows each of input_ids (B, T)."""
        return self.head(self.hidden_states(input_ids, cache, documents, row_seeds))

    def hidden_states(
        self,
        input_ids: Tensor,
        cache: Attend | None = None,
        documents: Tensor | None = None,
        row_seeds: Tensor | None = None,
        run: RunBlock = run_block,
    ) -> Tensor:
        """Return the final, normalised states (B, T, C) of input_ids (B, T) int64.

        With a cache, input_ids continue its tokens, without dropout. Where rows are packed,
        documents (B, T) int64 number the text of each token: attention stays among equal numbers,
        which a cache has to see to by itself, and positions begin at 0 in each. In training,
        row_seeds (B,) int64 determine the dropout masks of each row; by default they are drawn from
        torch's generator. `run` is `run_block`, or it compiled. Raises ValueError past block_size.
        """
        config = self.config
        start = 0 if cache is None else cache.length
        end = start + input_ids.size(1)
        if end > config.block_size:
            raise ValueError(
                f"the input reaches {end} tokens but the model has block_size={config.block_size}; "
                f"shorten it"
            )
        positions = torch.arange(start, end, device=input_ids.device)  # (T,)
        if documents is not None:
            positions = positions_within(documents)
        attend = cache
        if attend is None:
            mask = None if documents is None else document_mask(documents)
            rate = config.dropout if self.training else 0.0
            if rate and row_seeds is None:
                row_seeds = torch.randint(2**63 - 1, input_ids.shape[:1], device=input_ids.device)
            attend = Attend(mask, RowDropout(rate, row_seeds))
        x = self.embed(input_ids, positions, attend.before(input_ids))
        x = attend.of_layer(config.n_layer).dropout(x, 0)
        if x.is_cuda and torch.get_autocast_dtype("cuda") == torch.bfloat16:  # half of the traffic
            x = x.bfloat16() if torch.is_autocast_enabled("cuda") else x
        return self.run_blocks(x, self.rotation(positions), attend, run)

    def embed(self, input_ids: Tensor, positions: Tensor, before: Tensor) -> Tensor:
        """Return embeddings (..., T, C) of ids at positions, after ids `before`: (..., T) each."""
        x = self.wte(input_ids)
        if self.config.token_shift:
            x = x + self.shift * (positions > 0)[..., None] * self.wte(before)
        return self.ln_e(x + self.wpe(positions) if self.config.position == "learned" else x)

    def rotation(self, positions: Tensor) -> Tensor | None:
        """Return the rotary angles (2, ..., T, 1, D/2) of positions (..., T), None if learned."""
        config = self.config
        if config.position == "learned":
            return None
        return rotary_angles(positions, rotary_speeds(config, positions.device))

    def run_blocks(
        self, x: Tensor, rotation: Tensor | None, attend: Attend, run: RunBlock = run_block
    ) -> Tensor:
        """Return the final, normalised states (B, T, C) of embeddings x (B, T, C)."""
        has_shortcut, embeddings = self.config.embd_shortcut, x.view_as(x)  # x itself: two graphs
        for layer, block in enumerate(self.h):
            mixed = (self.kept[layer], self.shortcut[layer], embeddings) if has_shortcut else ()
            x = run(block, x, rotation, attend.of_layer(layer), *mixed)
        return self.ln_f(x)

    @property
    def unembedding(self) -> "TokenEmbedding":
        """The rows that hidden states are multiplied with: of the token embedding, or its own."""
        return self.wte if self.config.tie_embeddings else self.lm_head

    def head(self, hidden_states: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., C)."""
        return soft_capped(self.unembedding.logits(hidden_states), self.config.logit_softcap)

    def num_parameters(self) -> int:
        """Count the parameters: a tied head once, padded rows not at all."""
        tables = (m for m in self.modules() if isinstance(m, TokenEmbedding))
        padding = sum(table.weight.size(0) - table.vocab_size for table in tables)
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise embeddings and linear layers as GPT-2 did.

        Normal with deviation 0.02, biases zero; projections onto the residual stream (`c_proj`) are
        scaled by 1/sqrt(number of them) (GPT-2 paper, section 2.3). With `zero_init` they are zero,
        as is an untied head. Other parameters keep the values of their constructors.
        """
        config = self.config
        residual_std = 0.0 if config.zero_init else INIT_STD / math.sqrt(2 * config.n_layer)
        nn.init.normal_(self.wte.weight[: config.vocab_size], std=INIT_STD)
        if not (config.tie_embeddings or config.zero_init):
            nn.init.normal_(self.lm_head.weight[: config.vocab_size], std=INIT_STD)
        if config.position == "learned":
            nn.init.normal_(self.wpe.weight, std=INIT_STD)
        for name, module in self.h.named_modules():
            if isinstance(module, nn.Linear):
                std = residual_std if name.endswith("c_proj") else INIT_STD
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class TokenEmbedding(nn.Module):
    """The token embedding, also the head, padded in memory where the vocabulary is large.

    Matrix products are faster over a multiple of 64 rows. The rows beyond `vocab_size` stay zero
    and are absent from logits and state dict.
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


class Block(nn.Module):
    """Attention, then a perceptron, each on a normalised copy of the residual stream.

    `model.block=my_package.MyBlock` replaces it by an `nn.Module` class with this constructor and
    this `forward`. A subclass may replace only `attn` or `mlp`:

        class MyBlock(Block):
            def __init__(self, config, layer):
                super().__init__(config, layer)
                self.mlp = SwiGLU(config.n_embd)  # (B, T, C) to (B, T, C)

    Forward receives, by position, and returns the new residual stream (B, T, C):

    - x (B, T, C): the residual stream.
    - rotation (2, ..., T, 1, D/2) for `rotate`; None with position=learned.
    - attend: an `Attend`. attend(self.layer, q, k, v), called once, is the attention of the tokens
      to those before them: (B, T, H, D) each. attend.dropout(x, site) is a `RowDropout`, for sites
      1 and 2. Its masks depend on the row's seed, the layer and the site alone: micro-batches and
      resumed runs drop alike. `nn.Dropout` draws from torch's generator instead.

    A block that mixes tokens through `attend` alone works with the KV cache, packed rows and the
    evaluations' shared contexts. One that mixes them in another way must be causal; generation then
    reads the whole context for each token, evaluation every continuation as a row of its own, and
    the documents of packed rows mix.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.ln_1 = make_norm(config, config.n_embd, config.norm_weight)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd, config.norm_weight)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Tensor | None, attend: Attend) -> Tensor:
        """Return the residual stream (B, T, C) after this block, of x (B, T, C) before it."""
        x = x + attend.dropout(self.attn(self.ln_1(x), rotation, attend), 1)
        return x + attend.dropout(self.mlp(self.ln_2(x)), 2)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it.

    The rows of `c_attn` are those of the query heads, the key heads and the value heads.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        n_rows = (config.n_head + 2 * config.kv_heads) * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, n_rows, bias=config.bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, config.head_dim, config.qk_norm_weight)
            self.k_norm = make_norm(config, config.head_dim, config.qk_norm_weight)
        if config.qk_gain != 1:
            nn.init.constant_(self.q_norm.get_parameter("weight"), config.qk_gain)

    def forward(self, x: Tensor, rotation: Tensor | None, attend: Attend) -> Tensor:
        """Return the attention output (B, T, C) of normalised states x (B, T, C)."""
        config = self.config
        heads = self.c_attn(x).unflatten(-1, (-1, config.head_dim))
        q, k, v = heads.split((config.n_head, config.kv_heads, config.kv_heads), -2)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.c_proj(attend(self.layer, q, k, v).flatten(2))


class MLP(nn.Module):
    """Two linear maps with a nonlinearity between them; swiglu has a third, the gate."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if config.activation == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.inner_dim, bias=config.bias)
        self.c_fc = nn.Linear(config.n_embd, config.inner_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.inner_dim, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., C) of normalised states x (..., C)."""
        inner = self.c_fc(x)  # (..., n_inner)
        if self.config.activation == "swiglu":
            inner = F.silu(self.c_gate(x)) * inner
        elif self.config.activation == "relu2":
            inner = squared_relu(inner)
        else:
            inner = F.gelu(inner, approximate="tanh")
        return self.c_proj(inner)


def build_blocks(config: GPTConfig) -> list[nn.Module]:
    """Return the blocks of a model: of `Block`, or of the class that `config.block` names.

    Importing that class runs the code of its module. Raises ValueError where it cannot be a block.
    """
    if config.block is None:
        return [Block(config, layer) for layer in range(config.n_layer)]
    module, _, name = config.block.rpartition(".")
    try:
        block = getattr(importlib.import_module(module), name)
        if not (isinstance(block, type) and issubclass(block, nn.Module)):
            raise TypeError("it is not a subclass of torch.nn.Module")
        inspect.signature(block.forward).bind(*inspect.signature(Block.forward).parameters)
        return [block(config, layer) for layer in range(config.n_layer)]
    except Exception as error:  # whatever code of another package raises
        raise ValueError(
            f"model.block={config.block} is no block ({type(error).__name__}: {error}): a block "
            f"is an importable torch.nn.Module class, constructed with (config, layer) and called "
            f"with (x, rotation, attend)"
        ) from error


def make_norm(config: GPTConfig, n_channels: int, has_weight: bool) -> nn.Module:
    """Return a new normalisation over channels, with or without weights (and biases)."""
    if config.norm == "rmsnorm":
        return RMSNorm(n_channels, config.norm_eps, has_weight)
    return nn.LayerNorm(n_channels, config.norm_eps, has_weight, config.bias)


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return logits (..., V) within the cap on either side (Gemma 2, arXiv 2408.00118)."""
    return logits if cap is None else (logits / cap).tanh() * cap


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the attention (B, H, T, D) of queries (B, H, T, D) to k and v (B, H', T', D).

    Where there are fewer key heads, H / H' consecutive query heads share one.
    The last query attends to all keys, each one before to one key less. A mask (B, 1, T, T) of
    booleans, True to attend, replaces this. `drop` is applied to the attention weights
    (B, H, T, T), which are then stored for the backward: fused kernels draw their own dropout.
    """
    if k.size(1) < q.size(1):
        k, v = (part.repeat_interleave(q.size(1) // k.size(1), dim=1) for part in (k, v))
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

    On a CPU, in bfloat16 and for a short context, the fused kernel takes longer, forward and
    backward: 3.0 times at T=128, 2.0 at 256 and 1.8 at 512 (D=64, one core of an AMD EPYC).
    """
    B, H, T, D = q.shape
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    else:
        mask = mask.expand(-1, H, -1, -1).flatten(0, 1)  # (B*H, T, T)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    keys = k.flatten(0, 1).transpose(1, 2)  # (B*H, D, T)
    scores = torch.baddbmm(bias, q.flatten(0, 1), keys, alpha=D**-0.5)  # (B*H, T, T)
    weights = scores.softmax(-1)
    if drop is not None:
        weights = drop(weights.view(B, H, T, T)).flatten(0, 1)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)


def document_mask(documents: Tensor) -> Tensor:
    """Return the mask (B, 1, T, T) bool of causal attention within documents (B, T)."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def positions_within(documents: Tensor) -> Tensor:
    """Return each token's distance (B, T) from the first of its document (B, T), a run of equals.

    >>> positions_within(torch.tensor([[0, 0, 0, 1, 1, 2]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    indices = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    return indices - indices.where(begins, 0).cummax(dim=1).values


def rotary_speeds(config: GPTConfig, device: torch.device | str = "cpu") -> Tensor:
    """Return the angle per position of each pair of channels (D/2,) (RoFormer, section 3.2.2).

    With `rope_scaling` a pair that turns fewer than `low` times within the original context turns
    `factor` times as slowly; one between `low` and `high` times is interpolated.
    """
    D = config.head_dim
    channels = torch.arange(0, D, 2, device=device, dtype=torch.float32)
    speeds = config.rope_base ** (-channels / D)
    if config.rope_scaling is None:
        return speeds
    factor, low, high, context = config.rope_scaling
    unscaled = ((context * speeds / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return speeds * (unscaled + (1 - unscaled) / factor)


def rotary_angles(positions: Tensor, speeds: Tensor) -> Tensor:
    """Return cosine and sine (2, ..., T, 1, D/2) of positions' (..., T) angles at speeds (D/2,).

    They are computed in each call, in float32: it costs microseconds, and a model has no buffers to
    lose or to round when it moves to another device or precision.
    """
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
