"""Count kernels and bytes of the GPU code that torch.compile generates, without a GPU.

    python benchmarks/inductor_code.py --model gpt2_small [--set dropout=0.1] [--code DIR]

Needs PyTorch's CUDA build with Triton, but no GPU: a block and the loss, the parts that
`nanogpt/training/compiled.py` compiles, are traced in bf16-mixed on CPU tensors without storage,
and their graphs lowered by Inductor for an H100. Nothing is launched, and what Inductor decides by
timing stays as it is by default. Uses internals of PyTorch 2.11.

Kernels are Triton's, and others: products and attention. Bytes are what kernels read and write,
each buffer once, per token: the difference of two numbers of rows, without the casts of weights.
"""

import argparse
import copy
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import random_models
import torch
import triton
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._inductor import compile_fx, metrics
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

from nanogpt.dropout import RowDropout
from nanogpt.model import GPT, Attend, run_block
from nanogpt.training.cross_entropy import summed_cross_entropy

CUDA = torch.device("cuda", 0)
H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, warp_size=32, gcnArchName="")
H100.total_memory, H100.L2_cache_size = 80 * 2**30, 50 * 2**20
H100.multi_processor_count, H100.max_threads_per_multi_processor = 132, 2048
H100.regs_per_multiprocessor, H100.shared_memory_per_block_optin = 65536, 232448
CALL = r"^\s*(extern_kernels\.|\w+ = torch\.ops\.aten\.)"  # of another kernel, in generated code
WIDE = ("layer_norm", "softmax", "cross_entropy")  # which CUDA's autocast runs in float32
ROWS = 16  # Inductor cuts the size of a buffer at 1e9 elements


def pretend() -> None:
    """Let PyTorch and Triton find an H100."""
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
    }
    answers |= {"device_count": 1, "current_device": 0, "get_device_capability": (9, 0)}
    answers |= {"get_device_name": H100.name, "get_device_properties": H100}
    answers |= {"synchronize": None, "set_device": None, "set_rng_state": None}
    answers |= {"_lazy_init": None, "_get_device_properties": H100}
    answers["get_rng_state"] = torch.zeros(16, dtype=torch.uint8)
    places: list[tuple[Any, str, Any]] = [(torch.cuda, *pair) for pair in answers.items()]
    places += [(torch.cuda.random, name, answers[name]) for name in answers if "rng" in name]
    places += [(fuse_attention, "_sfdp_init", None), (pad_mm, "_pad_mm_init", None)]
    places += [
        (misc_patterns, "_misc_patterns_init", None),
        (fake_tensor, "init_gpu_context", None),
    ]
    places += [(torch.compiler, "is_compiling", True)]
    for module, name, answer in places:
        setattr(module, name, lambda *args, answer=answer, **kwargs: answer)
    driver = SimpleNamespace(get_current_device=lambda: 0, get_active_torch_device=lambda: CUDA)
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    driver.get_current_stream = lambda device=0: 0
    triton.runtime.driver.set_active(driver)


class AsOnCuda(TorchFunctionMode):
    """Autocast as on a GPU, with cuDNN's attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            q, k, v = (part.bfloat16() for part in args)
            attend = torch.ops.aten._scaled_dot_product_cudnn_attention
            return attend(q, k, v, None, True, 0.0, True, False)[0]
        args = (args[0].float(), *args[1:]) if name in WIDE else args
        return func(*args, **(kwargs or {}))


class Part(torch.nn.Module):
    """A function of a module and of tensors."""

    def __init__(self, model: Any, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(self.model, *tensors)


def count(part: Part, tensors: list[Tensor], mode: Any) -> tuple[Counter[Any], dict[str, str]]:
    """Return kernels and bytes of a part's forward and backward, and their code."""
    counts: Counter[Any] = Counter()
    sources: dict[str, str] = {}

    def on_gpu(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return fake_tensor.FakeTensor(mode, meta, CUDA)

    def lower(traced: Any, arguments: list[Any], passed: str) -> Any:
        graph = copy.deepcopy(traced)
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            if passed == "backward":  # on CUDA tensors it would copy
                compile_fx._recursive_post_grad_passes(graph)
            for node in graph.graph.nodes:
                node.meta["val"] = tree_map(on_gpu, node.meta.get("val"))
                node.meta.pop("tensor_meta", None)
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": CUDA}
            graph.recompile()
            if passed == "forward":
                compile_fx._recursive_post_grad_passes(graph)
                _, *saved = (node.meta["val"] for node in traced.graph.output_node().args[0])
                counts["saved"] = sum(v.nbytes for v in saved if isinstance(v, Tensor))
            metrics.reset()
            inputs = [on_gpu(value) for value in arguments]
            lowering = GraphLowering(graph, inputs, is_backward=passed == "backward")
            with V.set_graph_handler(lowering):
                lowering.run(*inputs)
                sources[passed] = lowering.codegen()[0].value
                for node in lowering.scheduler.nodes:
                    is_other = isinstance(node, ExternKernelSchedulerNode)
                    counts[passed, is_other] += node.get_read_write_buffers_sizes()
        counts[passed] = metrics.generated_kernel_count
        return make_boxed_func(traced.forward)

    names = [name for name, _ in part.named_parameters()]
    n = len(names)
    run = aot_function(
        lambda *all: functional_call(part, dict(zip(names, all[:n], strict=True)), all[n:]),
        fw_compiler=partial(lower, passed="forward"),
        bw_compiler=partial(lower, passed="backward"),
        partition_fn=compile_fx.partition_fn,
        decompositions=select_decomp_table(),
    )
    with AsOnCuda(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = run(*part.parameters(), *tensors)
    out.backward(torch.empty_like(out))
    return counts, sources


def parts(model: GPT, rows: int, stream: torch.dtype, mode: Any) -> dict[str, Any]:
    """Return the counts of a block, and of the head with the loss, for a micro-batch."""
    shape = (rows, model.config.block_size)
    rotation = model.rotation(torch.arange(shape[1]))
    x = torch.zeros(*shape, model.config.n_embd, dtype=stream, requires_grad=True)
    with AsOnCuda(), torch.autocast("cpu", torch.bfloat16):
        states = model.ln_f(x).detach().requires_grad_()

    def block(block: Any, x: Tensor, seeds: Tensor, *angles: Tensor) -> Tensor:
        attend = Attend(None, RowDropout(model.config.dropout, seeds))
        return run_block(block, x, angles[0] if angles else None, attend)

    inputs = [x, torch.zeros(rows, dtype=torch.int64), *([] if rotation is None else [rotation])]
    targets = torch.zeros(shape, dtype=torch.int64)
    return {
        "block": count(Part(model.h[0], block), inputs, mode),
        "head and loss": count(Part(model, summed_cross_entropy), [states, targets], mode),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    random_models.add_options(parser)
    parser.add_argument("--code", type=Path, help="folder for the generated code")
    options = parser.parse_args()
    config = dataclasses.replace(random_models.shape(parser, options), n_layer=1)
    pretend()
    print(f"torch {torch.__version__}, triton {triton.__version__}, {H100.name}")
    print("residual stream, part, pass: kernels of Triton, others; kB per token of each")
    for stream in (torch.float32, torch.bfloat16):
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            few, many = (parts(GPT(config).train(), n, stream, mode) for n in (ROWS // 2, ROWS))
        for name, (counts, sources) in many.items():
            per_token = {key: counts[key] - few[name][0][key] for key in counts}
            kb = {
                k: f"{n / (ROWS // 2 * config.block_size) / 1000:.1f}" for k, n in per_token.items()
            }
            for passed, source in sources.items():
                what = f"{str(stream)[6:]}, {name}, {passed}"
                n_other = len(re.findall(CALL, source, re.MULTILINE))
                print(
                    f"{what}: {counts[passed]}, {n_other}; {kb[passed, False]}, {kb[passed, True]}"
                )
                if options.code:
                    options.code.mkdir(parents=True, exist_ok=True)
                    (options.code / f"{what}.py").write_text(source)
            print(f"    saved for the backward: {kb['saved']} kB per token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
