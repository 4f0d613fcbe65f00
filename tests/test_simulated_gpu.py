"""The CUDA paths on a simulated GPU: one device for all tensors, few waits, few kernels."""

import functools
import itertools
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention import varlen

from nanogpt.checkpoint import read_checkpoint
from nanogpt.data import module as data_module
from nanogpt.data.labelled_module import LabelledDataModule
from nanogpt.evaluation import hellaswag, perplexity
from nanogpt.generation import generate
from nanogpt.runs.directory import RunDirectory
from nanogpt.training import autotune
from nanogpt.training import module as training_module
from nanogpt.training.launch import count_devices, resolve_device
from nanogpt.training.module import StageModule
from serving.__main__ import check_engine
from serving.engine import native
from serving.engine.messages import (
    Classified,
    Classify,
    Computation,
    Embed,
    Embedded,
    Generate,
    Message,
    SamplingParams,
    Score,
    Settings,
    Stats,
    Tokens,
)
from serving.engine.registry import Registry
from serving.engine.runner import (
    Runner,
    all_cache_bytes,
    choose_device,
    choose_dtype,
    load_runner,
)
from tests.conftest import TINY_RUN
from tests.engine_models import MODERN, write_model
from tests.simulated_gpu import DEVICE, MEMORY, Activity, simulated_gpu
from tests.test_autotune import Given
from tests.test_classify_run import OPTIONS as CLASSIFY
from tests.test_classify_run import labelled  # noqa: F401
from tests.test_hellaswag import ROW, TOKENIZER, new_model
from tests.test_instruct import TINY as INSTRUCT
from tests.test_instruct import data_path  # noqa: F401
from tests.test_train import fit, metrics
from tests.test_varlen import looped_attention

# Of the CPU's kernel in bfloat16: CUDA's autocast computes rms_norm in float32.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

Waits = Counter[tuple[str, str]]
# The first and the last step are reported, the third is validated.
SIX_STEPS = (
    "max_steps=6",
    "micro_batch=2",
    "compile=false",
    "threads=1",
    "name=tiny",
    "callbacks.log_every_n_steps=100",
    "callbacks.validation.every_n_steps=3",
    "callbacks.checkpoint.every_n_steps=3",
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Activity]:
    monkeypatch.setattr(autotune, "PRODUCT_SIDE", {"cuda": 64})
    monkeypatch.setattr(autotune, "PRODUCT_S", 0.01)
    monkeypatch.setattr(autotune, "MEASURE_S", 0.01)
    with simulated_gpu() as activity:
        yield activity


@pytest.fixture
def watched(gpu: Activity, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Waits]]:
    """The waits up to each call of a stage's `training_step` and `validation_step`."""
    calls: dict[str, list[Waits]] = {"training_step": [], "validation_step": []}
    for name, found in calls.items():
        monkeypatch.setattr(StageModule, name, recording(getattr(StageModule, name), gpu, found))
    return calls


def recording(original: Callable[..., Any], gpu: Activity, found: list[Waits]) -> Any:
    @functools.wraps(original)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        found.append(gpu.waits.copy())
        return original(*args, **kwargs)

    return recorded


def between(calls: list[Waits]) -> list[Waits]:
    """Return the waits between consecutive calls."""
    return [after - before for before, after in itertools.pairwise(calls)]


def check_waits(watched: dict[str, list[Waits]]) -> None:
    """Neither steps that are not reported nor validation batches wait; a validation reads once."""
    steps, batches = between(watched["training_step"]), between(watched["validation_step"])
    assert [steps[i] for i in (1, 3, 4)] == [Counter()] * 3
    # Batches that no step is between; each validation has at least two.
    assert batches[0] == Counter()
    # The sums of the parts, two metrics, the loss again for the checkpoint; and two of the report.
    assert steps[2].total() <= 6


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return [f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}"]


def corpus_run(corpus_path: Path, places: list[str], *options: str) -> list[str]:
    return [*TINY_RUN, *SIX_STEPS, f"data.path={corpus_path}", *places, *options]


@pytest.mark.parametrize(
    "options", [["optim=adamw"], ["optim=muon", "trainer.precision=auto", "micro_batch=auto"]]
)
def test_pretraining_waits_for_reports_alone(
    options: list[str],
    corpus_path: Path,
    places: list[str],
    watched: dict[str, list[Waits]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_module, "VAL_BATCH_TOKENS", 32)
    fit(*corpus_run(corpus_path, places, *options))
    check_waits(watched)


def test_recomputation_where_no_row_fits_waits_for_nothing(
    corpus_path: Path,
    places: list[str],
    tmp_path: Path,
    watched: dict[str, list[Waits]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_pass = autotune.run_pass

    def small(model: Any, rows: int, precision: str, recompute: bool, **keys: Any) -> None:
        if not recompute or rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        run_pass(model, rows, precision, recompute, **keys)

    monkeypatch.setattr(autotune, "run_pass", small)
    monkeypatch.setattr(data_module, "VAL_BATCH_TOKENS", 32)
    fit(*corpus_run(corpus_path, places, "micro_batch=auto", "model.dropout=0.1"))
    check_waits(watched)
    recorded: Any = RunDirectory(tmp_path / "runs" / "tiny").recorded_config()
    resolved = recorded["resolved"]
    assert (resolved["activation_checkpointing"], resolved["micro_batch"]) == (True, 1)


def test_instruction_tuning_waits_for_reports_alone(
    data_path: Path,  # noqa: F811
    places: list[str],
    watched: dict[str, list[Waits]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_module, "VAL_BATCH_TOKENS", 64)
    kernel = mock.Mock(side_effect=looped_attention, __signature__=signature(varlen.varlen_attn))
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    stage = ("stage=instruct", *INSTRUCT, *SIX_STEPS, "data=instructions", "init_from=null")
    fit(*stage, f"data.path={data_path}", *places, "trainer.precision=bf16-mixed")
    check_waits(watched)
    assert kernel.called


def test_classification_waits_for_reports_alone(
    labelled: Path,  # noqa: F811
    places: list[str],
    watched: dict[str, list[Waits]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LabelledDataModule, "val_batch_rows", 4)
    fit(*CLASSIFY, *SIX_STEPS, f"data.path={labelled}", *places)
    check_waits(watched)


def test_the_losses_are_those_of_the_cpu(
    corpus_path: Path, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("max_steps=2", "optim=adamw", "callbacks.log_every_n_steps=1")
    options = corpus_run(corpus_path, places, *keys)
    reached = []
    for name in ("cpu", "gpu"):
        if name == "gpu":
            monkeypatch.setattr(autotune, "PRODUCT_SIDE", {"cuda": 64})
            with simulated_gpu():
                fit(*options, f"name={name}")
        else:
            fit(*options, f"name={name}")
        rows = metrics(tmp_path / "runs" / name, "train/loss", "train/grad_norm")
        reached.append([float(value) for row in rows for value in row])
    assert reached[0] == pytest.approx(reached[1], rel=1e-5)


def test_a_resumed_run_ends_with_the_same_weights(
    gpu: Activity,
    corpus_path: Path,
    places: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = ("max_steps=3", "callbacks.checkpoint.every_n_steps=1", "micro_batch=4")
    keys = ("optim=muon", "model.dropout=0.1", "~callbacks.samples", "~callbacks.validation_parts")
    options = corpus_run(corpus_path, places, *keys, *short)
    fit(*options, "name=whole")
    original, n_steps = training_module.set_learning_rates, 0

    def failing(*args: Any) -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 2:
            raise RuntimeError("stopped")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "set_learning_rates", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            fit(*options, "name=resumed")
    fit(*options, "name=resumed")
    whole, resumed = (
        read_checkpoint(tmp_path / "runs" / name / "checkpoints" / "last.ckpt")["state_dict"]
        for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_muon_in_float16_waits_once_a_step(
    corpus_path: Path, places: list[str], watched: dict[str, list[Waits]]
) -> None:
    """torch's GradScaler reads whether the gradients are finite; fused AdamW checks by itself."""
    keys = ("max_steps=4", "trainer.precision=16-mixed", "optim=muon", "~callbacks.samples")
    fit(*corpus_run(corpus_path, places, *keys))
    waits = between(watched["training_step"])[1]
    assert [reason for reason, _ in waits.elements()] == ["_local_scalar_dense"]


@pytest.mark.parametrize("switches", [{"token_shift": True}, MODERN], ids=["shift", "modern"])
def test_scores_and_texts_are_those_of_the_cpu(switches: dict[str, Any]) -> None:
    rows = [ROW, {**ROW, "ctx": "He sings", "label": 2}]
    items = [hellaswag.Item.model_validate(row) for row in rows]
    requests = [hellaswag.completion_request(TOKENIZER, item) for item in items]
    tokens = TOKENIZER.encode("A text of several windows, scored one after another. " * 4)

    def results(device: str) -> list[Any]:
        model = new_model(block_size=64, **switches).to(device)
        found: list[Any] = [*hellaswag.scores(model, items, requests).values()]
        found += perplexity.scores(model, TOKENIZER, tokens, stride=32).values()
        greedy = generate(model, tokens[:20], max_new_tokens=60, temperature=0)
        sampled = generate(model, tokens[:20], max_new_tokens=9, top_k=20, top_p=0.9, seed=1)
        return [*found, *greedy, *sampled]

    expected = results("cpu")
    with simulated_gpu() as activity:
        assert results("cuda") == pytest.approx(expected, rel=1e-4)
    assert activity.kernels


SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_k": 50, "seed": 2, "logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3},
    {"temperature": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.2, "seed": 4},
    {"temperature": 0.7, "logit_bias": {5: 1.0, 9: -100.0}, "logprobs": 0, "seed": 5},
    {"temperature": 0.9, "grammar": "start: /[a-z0-9]+/", "logprobs": 1, "seed": 6},
]
PROMPT = [(7 * i) % 250 for i in range(90)]


def load(path: Path, device: str, **settings: Any) -> tuple[Runner, list[Message]]:
    """Return a model of the engine and the list of the messages that it emits."""
    (entry,) = Registry(str(path)).entries
    messages: list[Message] = []
    given = {"device": device, "dtype": "fp32", "max_slots": 8, "chunk_tokens": 64, **settings}
    chosen = Settings(**given)
    return load_runner(entry, chosen, Stats(), lambda _, m: messages.append(m), 1e9), messages


def run(runner: Runner, requests: list[Computation]) -> None:
    for request in requests:
        runner.prepared(request, lambda: None)
        runner.add(None, request)
    while runner.scheduler.sequences:
        runner.step()


def writing(n: int, params: list[dict[str, Any]], max_tokens: int = 5) -> list[Computation]:
    """Return n requests for texts, of different lengths and without a common beginning."""
    return [
        Generate(str(i), "run", PROMPT[i : 40 + 2 * i], SamplingParams(max_tokens, **params[i]))
        for i in range(n)
    ]


@pytest.mark.parametrize("keys", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_engine_answers_as_on_a_cpu(
    dtype: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "run" / "last.ckpt", labels=["a", "b"], **keys)
    monkeypatch.setattr(native, "load_library", lambda: None)

    def answers(device: str) -> tuple[dict[str, list[int]], dict[str, list[float]], int]:
        """Return the tokens of each request, its numbers, and the reused tokens of prompts."""
        runner, messages = load(tmp_path, device, dtype=dtype)
        others = [Score("score", "run", PROMPT), Classify("class", "run", PROMPT[:30])]
        run(runner, [*writing(len(SAMPLERS), SAMPLERS), *others, Embed("mean", "run", PROMPT)])
        again = SamplingParams(3, temperature=0.0)
        run(runner, [Generate("again", "run", [*PROMPT[:40], 3, 4], again)])
        ids: defaultdict[str, list[int]] = defaultdict(list)
        numbers: defaultdict[str, list[float]] = defaultdict(list)
        for message in messages:
            if isinstance(message, Classified):
                numbers[message.request_id] += message.probabilities
                continue
            if isinstance(message, Embedded):
                numbers[message.request_id] += struct.unpack("<64f", message.vector)
                continue
            assert isinstance(message, Tokens)
            ids[message.request_id] += message.ids
            numbers[message.request_id] += [own or 0.0 for own, _, _ in message.logprobs or []]
        return ids, numbers, runner.stats.cached_tokens

    ids, numbers, _ = answers("cpu")
    with simulated_gpu() as activity:
        found_ids, found_numbers, n_cached = answers("cuda")
    assert activity.kernels["graph"]  # none of the decode steps' operations waits
    assert n_cached == 40
    assert len(numbers["score"]) == len(PROMPT)
    if dtype == "fp32":
        assert found_ids == ids
        assert found_numbers == {name: pytest.approx(n, abs=1e-4) for name, n in numbers.items()}
    else:  # rounding may change which token is sampled
        assert {n: len(found_ids[n]) for n in ids} == {n: len(own) for n, own in ids.items()}
        for name in ("score", "class"):
            assert found_numbers[name] == pytest.approx(numbers[name], abs=0.1)


def decode_step(gpu: Activity, path: Path, params: list[dict[str, Any]]) -> int:
    """Return the kernels of a step in which every stream decodes; the waits are left in `gpu`."""
    runner, _ = load(path, "cuda", invariant=False)
    for request in writing(len(params), params, max_tokens=20):
        runner.prepared(request, lambda: None)
        runner.add(None, request)
    while sum(s.is_decoding for s in runner.scheduler.running) < len(params):
        runner.step()
    runner.step()  # which the next one may read
    gpu.waits.clear()
    gpu.kernels.clear()
    runner.step()
    return gpu.kernels.total()


def test_more_streams_launch_no_more_kernels(gpu: Activity, tmp_path: Path) -> None:
    write_model(tmp_path / "run" / "last.ckpt")
    one, eight = (decode_step(gpu, tmp_path, SAMPLERS[1:2] * n) for n in (1, 8))
    assert 0 < eight <= one


@pytest.mark.parametrize("params", SAMPLERS)
def test_a_decode_step_waits_once(gpu: Activity, tmp_path: Path, params: dict[str, Any]) -> None:
    write_model(tmp_path / "run" / "last.ckpt")
    decode_step(gpu, tmp_path, [params] * 2)
    assert gpu.waits.total() == 1, gpu.waits


@pytest.mark.parametrize("free", [1e9, 1.5e6], ids=["much", "little"])
def test_slots_and_chunks_follow_the_gpu(gpu: Activity, free: float, tmp_path: Path) -> None:
    write_model(tmp_path / "run" / "last.ckpt")
    with mock.patch.object(torch.cuda, "mem_get_info", return_value=(free, MEMORY)):
        runner, _ = load(tmp_path, "cuda", max_slots=None, chunk_tokens=None)
    slot_bytes = 2 * 2 * 256 * 64 * 4  # keys and values: 2 layers, 256 tokens, 64 channels in fp32
    n_slots = min(256, int(0.8 * free / slot_bytes))
    assert (runner.scheduler.slots.n_free, runner.scheduler.chunk_tokens) == (n_slots, 1024)


@pytest.mark.parametrize(
    ("capability", "precision", "dtype"),
    [
        ((6, 1), "32-true", "fp32"),
        ((7, 0), "16-mixed", "fp32"),
        ((7, 5), "16-mixed", "fp32"),
        ((8, 0), "bf16-mixed", "bf16"),
        ((9, 0), "bf16-mixed", "bf16"),
    ],
)
def test_precision_and_cache_follow_the_gpu(
    capability: tuple[int, int], precision: str, dtype: str
) -> None:
    with simulated_gpu(capability):
        assert autotune.choose_precision(Given(DEVICE))[0] == precision
        assert choose_dtype("auto", choose_device("auto")) == dtype
        assert all_cache_bytes(Settings()) == MEMORY / 2
        assert all_cache_bytes(Settings(cache_gb=3)) == 3e9


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_ranks_take_the_gpu_of_their_number(
    accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with simulated_gpu():
        assert resolve_device(accelerator) == torch.device("cuda", 3)
        assert resolve_device("cpu") == torch.device("cpu")
        assert count_devices("auto", accelerator) == 1


@pytest.mark.parametrize(("n_steps", "choice"), [(70, False), (80, True)])
def test_gpus_compile_where_it_pays(
    n_steps: int, choice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a second becomes 0.4 s shorter; the compilation takes 30 s."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with simulated_gpu():
        trials = Given(DEVICE, seconds={(4, "bf16-mixed"): 0.25}, peaks={"bf16-mixed": 1e15})
        found = autotune._choose_compile(trials, "bf16-mixed", 4, n_steps, False)
    assert found == (choice, f"would save about {0.4 * n_steps:.0f} s of the run and take 30 s")


@pytest.mark.parametrize("dtype", ["fp24", "int8"])
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_dtype_without_cuda_kernels_is_refused(device: str, dtype: str) -> None:
    with simulated_gpu():
        with pytest.raises(ValueError, match=f"dtype={dtype} has no CUDA kernels; pass dtype=bf16"):
            check_engine(Settings(device=device, dtype=dtype))  # type: ignore[arg-type]
        check_engine(Settings(device="cpu", dtype=dtype))  # type: ignore[arg-type]
        check_engine(Settings(device=device, dtype="bf16"))
    check_engine(Settings(device="auto", dtype=dtype))  # type: ignore[arg-type]


# The simulated GPU itself


def test_operations_on_two_devices_are_refused(gpu: Activity) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    for mix in (
        lambda: torch.stack([there, here]),
        lambda: torch.stack([there.sum(), torch.tensor(3.0)]),  # a scalar, too
        lambda: there + here,
        lambda: here[there.long()],
        lambda: torch.where(there > 0, there, here),
    ):
        with pytest.raises(RuntimeError, match="at least two devices"):
            mix()
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert (there * 2).device == DEVICE
    with pytest.raises(TypeError, match="cuda:0"):
        there.numpy()


def test_waits_of_the_host_are_counted(gpu: Activity) -> None:
    x = torch.arange(4.0, device="cuda")
    gpu.waits.clear()
    assert not (x + 1).square_().to(torch.float64).is_cpu  # none
    assert not gpu.waits
    for n, read in enumerate(
        (
            lambda: x.sum().item(),
            lambda: x.tolist(),
            lambda: bool((x > 0).all()),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x.cpu(),
            lambda: x.to("cpu", torch.float64),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: torch.ones(2).to("cuda"),
        ),
        1,
    ):
        read()
        assert gpu.waits.total() == n
    torch.ones(2).to("cuda", non_blocking=True)
    assert gpu.waits.total() == 9


def test_an_asynchronous_download_is_complete_after_a_wait(gpu: Activity) -> None:
    x = torch.arange(3, device="cuda")
    page_locked = torch.empty_like(x, device="cpu", pin_memory=True)
    copies = [x.to("cpu", non_blocking=True), page_locked.copy_(x, non_blocking=True)]
    assert not gpu.waits
    assert all(copy.tolist() != [0, 1, 2] for copy in copies)
    torch.cuda.current_stream().record_event().synchronize()
    assert all(copy.tolist() == [0, 1, 2] for copy in copies)
    assert torch.empty(3, dtype=torch.int64).copy_(x, non_blocking=True).tolist() == [0, 1, 2]
    assert gpu.waits.total() == 2  # the host waits for a copy to memory that is not page-locked


def test_kernels_are_counted_and_views_are_not(gpu: Activity) -> None:
    x = torch.zeros(2, 3, device="cuda")
    gpu.kernels.clear()
    x.view(3, 2).t()[0].split(1)
    assert not gpu.kernels
    (x @ x.t()).relu()
    assert gpu.kernels == Counter(mm=1, relu=1)


def test_a_graph_repeats_what_was_captured(gpu: Activity) -> None:
    x, graph = torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x + 1).view(1, 2).mul_(2)
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [[8, 8]]
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
        y.sum().item()
