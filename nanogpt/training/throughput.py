"""FLOPs per token, a device's FLOP/s, and the share that is used (MFU)."""

import time
import warnings
from collections.abc import Callable

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from nanogpt.model import GPTConfig
from nanogpt.support import ANY, IN_BLOCKS, check_supported
from nanogpt.weights import model_without_weights

SUPPORTED = {**IN_BLOCKS, "position": ANY, "activation": ("gelu", "relu2")}
# Sides of the measured product: large enough to reach the device's rate.
GEMM_SIDE = {"cpu": 1024, "mps": 2048}
GEMM_SIDE_GPU = 8192
# Dense bfloat16 and float16 rates that Lightning's table lacks or gives with sparsity, from the
# data sheets' sparse rates halved: https://www.nvidia.com/en-us/data-center/h200/, .../h100/.
DENSE_HALF_FLOPS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H100 NVL": 835.5e12,
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
    n_block = 12 * L * C**2
    if config.block is not None:
        blocks = model_without_weights(config).h
        n_block = sum(parameter.numel() for parameter in blocks.parameters())
    return 6 * (n_block + config.vocab_size * C) + 12 * L * C * T


def mfu(
    tokens_per_s: float, flops_per_token: float, peak_flops: float, n_devices: int = 1
) -> float:
    """Return the share of the devices' peak that the model's arithmetic uses."""
    return tokens_per_s * flops_per_token / (peak_flops * n_devices)


def make_product(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that times one product of random matrices, in seconds per FLOP.

    The matrices are large enough to reach the device's rate.
    """
    side = GEMM_SIDE.get(device.type, GEMM_SIDE_GPU)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.rand(side, side, generator=generator, device=device).to(dtype)
    b = a.t().contiguous()
    out = torch.empty_like(a)

    def seconds_per_flop() -> float:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        return (time.perf_counter() - start) / (2 * side**3)

    return seconds_per_flop


def peak_flops(device: torch.device, dtype: torch.dtype, measured: float) -> tuple[float, str]:
    """Return the device's arithmetic per second in `dtype` and where the number comes from.

    Tables name some GPUs wrongly or with rates that no dense product can reach, so a table's
    value is taken only where the measured rate agrees with it.
    """
    listed = _listed_flops(device, dtype)
    low, high = BELIEVED_SHARE
    if listed is not None and low * listed <= measured <= high * listed:
        return listed, f"data sheet of {torch.cuda.get_device_name(device)}"
    return measured, "measured by a matrix product"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _listed_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if name in DENSE_HALF_FLOPS and dtype in (torch.bfloat16, torch.float16):
        return DENSE_HALF_FLOPS[name]
    with warnings.catch_warnings():  # an unknown GPU is no reason to warn: it is measured
        warnings.simplefilter("ignore")
        return get_available_flops(device, dtype)
