"""A simulated GPU: tensors that are on cuda:0 for the product and compute on the CPU.

Operations that mix devices raise, as CUDA's do. Kernels (operations that are no views) and waits of
the host (reads of a value, uploads and downloads that block) are counted, with the line of the
product that causes them. An asynchronous download holds other values until the host has waited.

C++ sees CPU tensors, so that torch chooses the CPU's kernels, autocast lists and random numbers.
Graphs repeat what was captured, and their kernels are counted. Neither speed and memory nor CUDA's
rounding, the order of streams and the compiler are simulated.
"""

import contextlib
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parent.parent
PRODUCT = tuple(f"{ROOT}/{name}" for name in ("nanogpt/", "serving/", "train.py"))
DEVICE = torch.device("cuda", 0)
MEMORY = 80 * 2**30
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
# Operations whose result has a value, or a shape, that the host has to know.
READING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "repeat_interleave"),
}
UPLOADS = ("tensor", "as_tensor", "asarray")
real_autocast = torch.autocast


class Activity:
    """What a simulated GPU does: kernels by name, and waits by their reason and the line."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.captured: list[Any] | None = None  # operations of the graph that is captured now
        self._downloads: list[tuple[Tensor, Tensor]] = []

    def wait(self, reason: str) -> None:
        """End all downloads; count the wait unless it is one of another thread.

        Raises RuntimeError, as CUDA does, while a graph is captured.
        """
        if self.captured is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {reason}")
        if threading.current_thread() is threading.main_thread():
            self.waits[reason, _line()] += 1
        downloads, self._downloads = self._downloads, []
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for target, values in downloads:
                target.copy_(values)

    def download(self, values: Tensor, target: Tensor, *, blocks: bool) -> Tensor:
        """Copy values to the host's memory, which is complete after the next wait."""
        self._downloads.append((target, values.clone()))
        if blocks:
            self.wait("download")
        else:
            target.fill_(77)
        return target


activity = Activity()  # of the simulated GPU in use


class GpuTensor(Tensor):
    """A tensor on the simulated GPU around one on the CPU, which has its values."""

    cpu_tensor: Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, values: Tensor) -> "GpuTensor":
        # For C++ on the CPU: autograd looks for the threads of other devices.
        made: GpuTensor = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device("cpu"),
        )
        made.cpu_tensor = values
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.cpu_tensor})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # Module.to swaps such parameters
        return ["cpu_tensor"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *args: Any) -> "GpuTensor":
        return GpuTensor(inner["cpu_tensor"])

    def __reduce_ex__(self, protocol: Any) -> Any:  # a checkpoint has plain tensors
        activity.wait("pickling")
        return self.cpu_tensor.detach().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        activity.wait("tolist")
        with torch._C.DisableTorchFunction():
            return self.cpu_tensor.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {k: v for k, v in (kwargs or {}).items() if k not in ("device", "pin_memory")}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        others = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
        name = func.overloadpacket.__name__
        if not func.is_view:
            activity.kernels[name] += 1
        if name in READING and kwargs.get("output_size") is None:
            activity.wait(name)
        if func in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1]):
            activity.wait("boolean index")
        if func is aten.copy_.default and others:
            return _copy(*args, **kwargs)
        if others:
            _check_mixed(func, args, others)
        unwrapped = tree_map(_values, (args, kwargs))
        result = func(*unwrapped[0], **unwrapped[1])
        if activity.captured is not None:
            activity.captured.append((func, *unwrapped, result))
        if torch.Tag.inplace_view in func.tags:  # the shape that C++ sees changes too
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
        known = {id(t.cpu_tensor): t for t in tensors if isinstance(t, GpuTensor)}
        return tree_map(
            lambda leaf: known[id(leaf)] if id(leaf) in known else _on_gpu(leaf), result
        )


def _check_mixed(func: Any, args: Any, others: list[Tensor]) -> None:
    """Raise RuntimeError as CUDA does, but for scalars of pointwise operations and for indices."""
    if func in INDEXING and isinstance(args[0], GpuTensor):
        activity.wait("upload of an index")
        others = [t for t in args[2:3] if not isinstance(t, GpuTensor) and t.dim() > 0]
    elif torch.Tag.pointwise in func.tags:
        others = [tensor for tensor in others if tensor.dim() > 0]
    if others:
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func}, on the CPU {shapes}, {_line()})"
        )


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between devices, in place."""
    if isinstance(source, GpuTensor):
        blocks = not (non_blocking and getattr(target, "is_page_locked", False))
        return activity.download(source.cpu_tensor, target, blocks=blocks)
    if not non_blocking:
        activity.wait("upload")
    _values(target).copy_(source)
    return target


def _values(leaf: Any) -> Any:
    return leaf.cpu_tensor if isinstance(leaf, GpuTensor) else leaf


def _on_gpu(leaf: Any) -> Any:
    plain = isinstance(leaf, Tensor) and not isinstance(leaf, GpuTensor)
    return GpuTensor(leaf) if plain else leaf


def _line() -> str:
    """Return the innermost line of the product and its function."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PRODUCT):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    path = Path(frame.f_code.co_filename).relative_to(ROOT)
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"


class _Placing(TorchFunctionMode):
    """Handles what names a device: factories, and moves between devices."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda"):
            return _move(func, name, args, kwargs)
        if name == "pin_memory":
            return _page_locked(args[0])
        if name == "__setitem__" and isinstance(args[0], GpuTensor):  # a number becomes a kernel's
            target, index, value = args
            if not isinstance(value, Tensor):
                value = GpuTensor(torch.tensor(value, dtype=target.dtype))
            return func(target, index, value)
        is_page_locked = kwargs.pop("pin_memory", False)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        if not _is_cuda(kwargs["device"]):
            made = func(*tree_map(_values, args), **kwargs)
            return _page_locked(made) if is_page_locked else made
        kwargs["device"] = "cpu"
        if name in UPLOADS and not isinstance(args[0], GpuTensor):
            activity.wait("upload")
        else:
            activity.kernels[name] += 1
        return tree_map(_on_gpu, func(*tree_map(_values, args), **kwargs))


def _page_locked(tensor: Tensor) -> Tensor:
    """Mark a tensor as one that the GPU can write while the host goes on."""
    tensor.is_page_locked = True  # type: ignore[attr-defined]
    return tensor


def _move(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return Tensor.to, .cpu or .cuda of a tensor of either device."""
    source, *rest = args
    given = [*rest, *kwargs.values()]
    like = next((value for value in given if isinstance(value, Tensor)), None)
    device = next((value for value in given if isinstance(value, str | torch.device)), None)
    if name != "to" or like is not None:
        device = like.device if like is not None else torch.device(name)
    dtypes = [value for value in given if isinstance(value, torch.dtype)]
    dtype = next(iter(dtypes), None if like is None else like.dtype)
    blocks = not kwargs.get("non_blocking", next((v for v in given if isinstance(v, bool)), False))
    to_gpu = isinstance(source, GpuTensor) if device is None else _is_cuda(device)
    with torch._C.DisableTorchFunction():
        if to_gpu and not isinstance(source, GpuTensor):
            if blocks:
                activity.wait("upload")
            return _on_gpu(source.detach().to(dtype or source.dtype, copy=True))
        if isinstance(source, GpuTensor) and not to_gpu:
            values = source.cpu_tensor.detach().to(dtype or source.dtype)
            return activity.download(values, torch.empty_like(values), blocks=blocks)
    if not isinstance(source, GpuTensor):
        return func(*args, **kwargs)
    return source if dtype in (None, source.dtype) else source.type(dtype)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Autocast(torch.autocast):
    """Autocast of the GPU; C++ sees CPU tensors, so that theirs is needed along with it."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(device_type, *args, **kwargs)
        cpu = real_autocast("cpu", *args, **kwargs)
        self.inner = cpu if device_type == "cuda" else contextlib.nullcontext()

    def __enter__(self) -> Any:
        self.inner.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        super().__exit__(*error)
        return self.inner.__exit__(*error)


class _Generator(torch.Generator):
    """A generator with the device that it is made for, and the numbers of the CPU's."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made: Any = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        made.own_device = torch.device(device)
        return made

    device = property(lambda self: self.own_device)


def _grouped(group: Callable[..., Any]) -> Callable[..., Any]:
    """Correct the devices in torch's groups of tensors, which C++ makes."""

    def corrected(tensors: Any, with_indices: bool = False) -> Any:
        device = DEVICE if isinstance(tensors[0][0], GpuTensor) else torch.device("cpu")
        return {(device, key[1]): found for key, found in group(tensors, with_indices).items()}

    return corrected


class _Graph:
    """A CUDA graph: the operations of a capture, repeated on the same tensors."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    @contextlib.contextmanager
    def capture(self, **options: Any) -> Iterator[None]:
        """Record operations; until the first replay, what they compute has no values."""
        activity.captured = self.calls
        try:
            yield
        finally:
            activity.captured = None
        for func, _, _, result in self.calls:
            for tensor in tree_leaves(result) if _makes_tensors(func) else ():
                tensor.fill_(77)

    def replay(self) -> None:
        activity.kernels["graph"] += 1
        for func, args, kwargs, result in self.calls:
            activity.kernels[func.overloadpacket.__name__] += not func.is_view
            again = None if func.is_view else func(*args, **kwargs)
            if _makes_tensors(func):
                for tensor, values in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    tensor.copy_(values)

    def pool(self) -> int:
        return 0


def _makes_tensors(func: Any) -> bool:
    return not (func.is_view or func._schema.is_mutable)


def _returning(values: dict[str, Any]) -> dict[str, Any]:
    return {name: mock.Mock(return_value=value) for name, value in values.items()}


@contextlib.contextmanager
def simulated_gpu(
    capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100 80GB HBM3"
) -> Iterator[Activity]:
    """Give this thread a GPU; yield its activity."""
    activity.__init__()  # type: ignore[misc]
    about = types.SimpleNamespace(name=name, total_memory=MEMORY)
    event = types.SimpleNamespace(synchronize=lambda: activity.wait("event"))
    stream = mock.Mock(**_returning({"is_capturing": False, "record_event": event}))
    shared: dict[str, Any] = {"is_available": True, "device_count": 1}
    values = shared | {"is_initialized": True, "current_stream": stream}
    values |= {"get_device_name": name, "get_device_capability": capability}
    values |= {"get_device_properties": about, "mem_get_info": (MEMORY, MEMORY)}
    values |= {"current_device": 0, "max_memory_allocated": 0, "get_rng_state_all": []}
    values["get_rng_state"] = torch.get_rng_state()
    values["is_current_stream_capturing"] = False
    unused = ["set_device", "manual_seed", "manual_seed_all", "empty_cache", "set_rng_state_all"]
    unused.append("set_rng_state")
    cuda = _returning(values | dict.fromkeys([*unused, "reset_peak_memory_stats"]))
    cuda |= {"device": contextlib.nullcontext, "stream": contextlib.nullcontext}
    cuda |= {"Stream": lambda device=None: stream, "CUDAGraph": _Graph, "graph": _Graph.capture}
    cuda["is_bf16_supported"] = lambda including_emulation=True: capability >= (8, 0)
    values = shared | {"current_accelerator": torch.device("cuda"), "current_stream": stream}
    accelerator = _returning(values | {"current_device_index": 0})
    for functions in (cuda, accelerator):
        functions["synchronize"] = lambda device=None: activity.wait("synchronize")
    groups = "_group_tensors_by_device_and_dtype"
    users = [sys.modules[f"torch.{name}"] for name in ("nn.utils.clip_grad", "optim.optimizer")]
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.multiple(torch.cuda, **cuda))
        enter(mock.patch.multiple(torch.accelerator, **accelerator))
        enter(mock.patch.multiple(torch, autocast=_Autocast, Generator=_Generator))
        enter(mock.patch.object(torch.amp, "autocast", _Autocast))
        # Inference mode admits no wrappers; no_grad computes the same.
        no_grad: dict[str, Any] = {
            "__enter__": torch.no_grad.__enter__,
            "__exit__": torch.no_grad.__exit__,
        }
        enter(mock.patch.multiple(torch.inference_mode, **no_grad))
        for user in users:
            enter(mock.patch.object(user, groups, _grouped(getattr(user, groups))))
        placing, run_backward = _Placing(), torch.autograd._engine_run_backward

        def placed(*args: Any, **kwargs: Any) -> Any:  # of what a backward computes again
            with placing:
                return run_backward(*args, **kwargs)

        enter(mock.patch.object(torch.autograd, "_engine_run_backward", placed))
        enter(placing)
        yield activity
