"""FLOPs per token, and a device's FLOP/s."""

import math
import warnings

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from nanogpt.model import GPTConfig
from nanogpt.support import ANY, IN_MODEL, check_supported
from nanogpt.weights import model_without_weights

SUPPORTED = {**IN_MODEL, "position": ANY, "activation": ("gelu", "relu2", "swiglu")}
# Dense bfloat16 rates (of a T4 float16) that Lightning's table lacks or gives otherwise, from data
# sheets, that of the RTX 4090 from the Ada whitepaper's appendix A; sparse rates are halved.
# https://www.nvidia.com/en-us/data-center/h200/, .../h100/, .../a100/, .../l4/, .../tesla-t4/
DENSE_HALF_FLOPS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}
# A table's value is believed where a matrix product reaches this share of it, and not more.
BELIEVED_SHARE = (0.5, 1.05)


def flops_per_token(config: GPTConfig) -> int:
    """Return the arithmetic of a token's forward and backward at full context.

    6 per weight of a matrix product, the head included and look-ups not, and 12 L C T for attention
    (PaLM, appendix B; attention is counted as if it were not causal, as nanoGPT and llm.c do).
    Blocks of another class are counted alike, every one of their parameters as a weight. Raises
    ValueError for a configuration whose arithmetic is not known.
    """
    consumer = "the FLOP count (nanogpt/training/throughput.py)"
    check_supported(config, consumer, SUPPORTED)
    L, C, T = config.n_layer, config.n_embd, config.block_size
    n_queries, n_keys = config.n_head * config.head_dim, config.kv_heads * config.head_dim
    n_products = 3 if config.activation == "swiglu" else 2
    n_block = L * C * (2 * (n_queries + n_keys) + n_products * config.inner_dim)
    if config.block is not None:
        blocks = model_without_weights(config).h
        n_block = sum(parameter.numel() for parameter in blocks.parameters())
    return 6 * (n_block + config.vocab_size * C) + 12 * L * n_queries * T


def peak_flops(device: torch.device, dtype: torch.dtype, measured: float) -> tuple[float, str]:
    """Return the device's arithmetic per second in `dtype` and where the number comes from.

    Tables name some GPUs wrongly or with rates that no dense product can reach, so a table's
    value is taken only where the measured rate agrees with it.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        table = DENSE_HALF_FLOPS if dtype in (torch.bfloat16, torch.float16) else {}
        with warnings.catch_warnings():  # an unknown GPU is no reason to warn: it is measured
            warnings.simplefilter("ignore")
            listed = table.get(name) or get_available_flops(device, dtype) or math.nan
        low, high = BELIEVED_SHARE
        if low * listed <= measured <= high * listed:
            return listed, f"data sheet of {name}"
    return measured, "measured by a matrix product"
