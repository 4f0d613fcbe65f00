"""FLOPs per token, and a device's FLOP/s."""

import torch

from nanogpt.model import GPTConfig
from nanogpt.support import ANY, IN_MODEL, check_supported
from nanogpt.weights import model_without_weights

SUPPORTED = {**IN_MODEL, "position": ANY, "activation": ("gelu", "relu2", "swiglu")}
# Dense bfloat16 rates (of a T4 float16) from data sheets, that of the RTX 4090 from the Ada
# whitepaper's appendix A; sparse rates are halved.
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
    """Return the device's arithmetic per second in `dtype` and where the number comes from."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        if name in DENSE_HALF_FLOPS:
            return DENSE_HALF_FLOPS[name], f"data sheet of {name}"
    return measured, "measured by a matrix product"
