"""Turn a checkpoint into a runner: its precision, its memory, its kernels."""

import logging
import os
import time

import torch
from torch import Tensor

from nanogpt.checkpoint import load_checkpoint
from nanogpt.model import GPT
from serving.engine import native
from serving.engine.compiling import processor_flags
from serving.engine.forward import Forward, round_to_24_bits
from serving.engine.messages import Settings, Stats
from serving.engine.native import ForwardPass
from serving.engine.registry import Entry
from serving.engine.runner import Runner
from serving.engine.scheduler import Scheduler
from serving.engine.slots import Slots, slot_bytes

log = logging.getLogger(__name__)


def load_runner(
    entry: Entry, settings: Settings, stats: Stats, cache_bytes: float, n_models: int = 1
) -> Runner:
    """Load an entry's checkpoint and make it ready to compute.

    It has as many slots, of `max_slots`, as a model's share of `cache_bytes` holds: at least one.

    Raises ValueError or FileNotFoundError for a file that is none of ours, ValueError for a model
    of which not one slot fits `cache_bytes`.
    """
    started = time.monotonic()
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    checkpoint = load_checkpoint(entry.path, device=device)
    precision = cache_dtype(dtype)
    model = checkpoint.model.requires_grad_(False)
    n_bytes = slot_bytes(checkpoint.config, precision)
    if n_bytes > cache_bytes:
        raise ValueError(
            f"the keys and values of block_size={checkpoint.config.block_size} tokens take "
            f"{n_bytes / 1e9:.1f} GB, more than the {cache_bytes / 1e9:.1f} GB there are for all "
            f"models; raise cache_gb"
        )
    n_slots = max(1, min(settings.max_slots, int(cache_bytes / n_models // n_bytes)))
    slots = Slots(checkpoint.config, n_slots, precision, device)
    forward = make_forward(model, slots.cache, dtype, invariant=settings.invariant)
    scheduler = Scheduler(slots, settings.chunk_tokens)
    log.info("loaded %s (%s) in %.1f s", entry.id, dtype, time.monotonic() - started)
    return Runner(
        *(entry.id, entry.revision, checkpoint, dtype, forward, scheduler, stats),
        created=entry.created,
    )


def make_forward(model: GPT, cache: Tensor, dtype: str, *, invariant: bool = True) -> ForwardPass:
    """Return the fastest forward pass for a model and its cache (L, 2, S, H, T, D) here.

    The engine's own kernels are `invariant` at no cost; others take longer for it.
    """
    if dtype == "fp24":
        round_to_24_bits(model)
    if native.supported(model, dtype, cache.device):
        forward = native.NativeForward(model, cache, dtype)
        model.to("meta")  # its weights are packed: free the others
        return forward
    return Forward(model.to(cache.dtype), cache, int8=dtype == "int8", invariant=invariant)


def cache_dtype(dtype: str) -> torch.dtype:
    """Return the precision of activations, keys and values for a precision of the weights."""
    return torch.float32 if dtype in ("fp32", "fp24") else torch.bfloat16


def choose_device(device: str) -> torch.device:
    """Return the device of a setting; `auto` is the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def check_device(device: str) -> None:
    """Raise ValueError for a device that this machine does not have."""
    available = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    available += [*(["cuda"] if gpus else []), *gpus]
    if device != "auto" and device not in available:
        raise ValueError(
            f"device={device} is not on this machine; choose from auto, {', '.join(available)}"
        )


def choose_dtype(dtype: str, device: torch.device) -> str:
    """Return the weights' precision; `auto` is bf16 where the machine computes in it, else fp32."""
    if dtype != "auto":
        return dtype
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        is_fast = "AVX512" in capability and "avx512_bf16" in processor_flags().split()
    else:  # older GPUs only emulate it
        cuda = device.type == "cuda"
        is_fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if is_fast else "fp32"


def all_cache_bytes(settings: Settings) -> float:
    """Return the memory for the keys and values of all models, before any is loaded."""
    device = choose_device(settings.device)
    if settings.cache_gb is not None:
        return settings.cache_gb * 1e9
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
