"""The programs that benchmarks/engine.py compares: the engine, and its peers where installed.

Each continues the same texts with the same random weights, in a process of its own.
"""

import ctypes
import importlib.util
import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt.export import main as export
from serving.engine.forward import Span
from serving.engine.messages import Generate, Message, SamplingParams, Settings, Stats, Tokens
from serving.engine.native import cache_dtype
from serving.engine.registry import find_entries
from serving.engine.runner import load_runner

MAX_STREAMS = 32
CHUNK_TOKENS = 64
N_COMPARED = 8  # tokens of a second turn
TOKENS_PER_STREAM, BATCH_TOKENS = 256, 1024  # of llama.cpp's contexts
Q8_0 = 7  # llama.cpp's LLAMA_FTYPE_MOSTLY_Q8_0


class Program:
    """Something that continues texts greedily. `weight_bytes` and `kv_bytes` are of one number."""

    needs: tuple[str, ...] = ()  # packages
    weight_bytes: float
    kv_bytes: float

    def run(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        """Continue all prompts by n_new tokens; return seconds in all, and to the first token."""
        raise NotImplementedError

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """Return log-probabilities (T, V) of what follows each of some tokens."""
        raise NotImplementedError


class Ours(Program):
    """The engine's runner: the scheduler, the kernels and the sampler, without its process."""

    def __init__(
        self, files: Path, dtype: Any, temperature: float = 0.0, device: str = "cpu"
    ) -> None:
        self.temperature = temperature
        sizes = {"fp32": 4.0, "fp24": 3.0, "bf16": 2.0, "int8": 1 + 2 / 64}  # with scales
        self.weight_bytes, self.kv_bytes = sizes[dtype], cache_dtype(dtype).itemsize
        (entry,) = find_entries(files / "model.ckpt")
        on_cpu: Any = {"max_slots": MAX_STREAMS, "chunk_tokens": CHUNK_TOKENS}
        settings = Settings(device=device, dtype=dtype, **on_cpu if device == "cpu" else {})
        self.runner = load_runner(entry, settings, Stats(), self._record, cache_bytes=1e12)

    def run(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        start = time.perf_counter()
        ids, first = self._write(prompts, n_new, scope=str(start))
        assert all(len(written) == n_new for written in ids)
        return time.perf_counter() - start, first

    def continue_texts(self, prompts: list[list[int]], n_new: int) -> list[list[int]]:
        """Return the tokens that continue the prompts."""
        return self._write(prompts, n_new, scope=str(time.perf_counter()))[0]

    def second_turn(self, prompt: list[int], reply: int, new: list[int]) -> tuple[float, float]:
        """Return seconds to the first token of a chat's second turn: anew, and after its first."""
        (answer,), _ = self._write([prompt], reply, scope=f"chat {time.perf_counter()}")
        turn = [*prompt, *answer, *new]
        cold, cold_s = self._write([turn], N_COMPARED, scope=f"new {time.perf_counter()}")
        scope = f"chat {time.perf_counter()}"
        self._write([prompt], reply, scope=scope)
        warm, warm_s = self._write([turn], N_COMPARED, scope=scope)
        assert warm == cold, "a second turn has another answer than the same prompt anew"
        return cold_s, warm_s

    def _write(
        self, prompts: list[list[int]], n_new: int, scope: str
    ) -> tuple[list[list[int]], float]:
        """Return what continues the prompts, and the seconds to the first token of the first."""
        params = SamplingParams(n_new, temperature=self.temperature)
        start, self.first_token = time.perf_counter(), 0.0
        self.written: list[list[int]] = [[] for _ in prompts]
        for n, prompt in enumerate(prompts):
            self.runner.add(None, Generate(str(n), "m", prompt, params, key=scope))
        while self.runner.scheduler.sequences:
            self.runner.step()
        return self.written, self.first_token - start

    def _record(self, client: object, message: Message) -> None:
        if isinstance(message, Tokens):
            self.written[int(message.request_id)] += message.ids
            self.first_token = self.first_token or time.perf_counter()

    def log_probabilities(self, ids: list[int]) -> Tensor:
        states = self.runner.forward.hidden_states([Span(0, 0, ids)])
        slot = self.runner.scheduler.slots.slots[0]
        slot.ids = slot.ids[:0]
        return self.runner.forward.logits(states).double().log_softmax(-1)


class Transformers(Program):
    """Hugging Face's `generate`, a batch for all texts."""

    needs = ("transformers",)

    def __init__(self, files: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.weight_bytes = self.kv_bytes = 4 if dtype == "fp32" else 2
        precision = torch.float32 if dtype == "fp32" else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_pretrained(files / "hf", dtype=precision)
        self.model = model.eval()
        self.model.generation_config.eos_token_id = None  # all texts reach their full length

    def run(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        ids = torch.tensor(prompts)
        first = self._seconds(ids, 1)
        return self._seconds(ids, n_new), first

    def _seconds(self, ids: Tensor, n_new: int) -> float:
        start = time.perf_counter()
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
        )
        assert made.size(1) == ids.size(1) + n_new
        return time.perf_counter() - start

    @torch.no_grad()
    def log_probabilities(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


class LlamaCpp(Program):
    """llama.cpp through its own batches: all texts decode together, as in its server's slots."""

    needs = ("llama_cpp", "gguf")

    def __init__(self, files: Path, dtype: str) -> None:
        self.api = api = _quiet_llama_cpp()
        self.weight_bytes = 4.0 if dtype == "fp32" else 34 / 32  # 32 numbers share a 2-byte scale
        self.kv_bytes = 2  # its default, and its fastest
        path = files / ("model.gguf" if dtype == "fp32" else "model-q8_0.gguf")
        self.model: Any = api.llama_model_load_from_file(
            str(path).encode(), api.llama_model_default_params()
        )
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch: Any = api.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.context: Any = None
        self.n_streams = 0

    def _begin(self, n_streams: int) -> None:
        """Have an empty context for so many texts."""
        api = self.api
        if n_streams != self.n_streams:
            settings: Any = api.llama_context_default_params()
            settings.n_ctx, settings.n_batch = n_streams * TOKENS_PER_STREAM, BATCH_TOKENS
            settings.n_seq_max = self.n_streams = n_streams
            settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
            if self.context:
                api.llama_free(self.context)
            self.context = api.llama_init_from_model(self.model, settings)
            assert self.context, "llama.cpp refused the settings"
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def run(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        self._begin(len(prompts))
        start = time.perf_counter()
        read = [
            (i, n, text, n == len(prompt) - 1)
            for text, prompt in enumerate(prompts)
            for n, i in enumerate(prompt)
        ]
        ids = self._read(read).argmax(-1).tolist()
        first = time.perf_counter() - start
        for n in range(len(prompts[0]), len(prompts[0]) + n_new - 1):
            ids = self._read([(i, n, text, True) for text, i in enumerate(ids)]).argmax(-1).tolist()
        return time.perf_counter() - start, first

    def log_probabilities(self, ids: list[int]) -> Tensor:
        self._begin(1)
        logits = self._read([(i, n, 0, True) for n, i in enumerate(ids)])
        return torch.from_numpy(logits).double().log_softmax(-1)

    def _read(self, tokens: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Read (id, position, text, whether to return its logits); return the logits (R, V)."""
        batch = self.batch
        for at, (id_, position, text, needs_logits) in enumerate(tokens):
            batch.token[at], batch.pos[at] = id_, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, text
            batch.logits[at] = needs_logits
        batch.n_tokens = len(tokens)
        assert self.api.llama_decode(self.context, batch) == 0
        rows = [
            np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, at), (self.n_vocab,))
            for at, token in enumerate(tokens)
            if token[3]
        ]
        return np.stack(rows)


class CTranslate2(Program):
    """CTranslate2's `generate_batch`, converted from the Hugging Face directory."""

    needs = ("ctranslate2", "transformers")

    def __init__(self, files: Path, dtype: str) -> None:
        import ctranslate2

        self.weight_bytes, self.kv_bytes = (4.0 if dtype == "fp32" else 1.0), 4
        self.generator = ctranslate2.Generator(
            str(files / "ct2"),
            device="cpu",
            compute_type={"fp32": "float32", "int8": "int8"}[dtype],
            intra_threads=torch.get_num_threads(),
        )
        self.names = json.loads((files / "ct2" / "vocabulary.json").read_text(encoding="utf-8"))

    def run(self, prompts: list[list[int]], n_new: int) -> tuple[float, float]:
        first = self._seconds(prompts, 1)
        return self._seconds(prompts, n_new), first

    def _seconds(self, prompts: list[list[int]], n_new: int) -> float:
        start = time.perf_counter()
        made = self.generator.generate_batch(
            [[self.names[i] for i in ids] for ids in prompts],
            max_length=n_new,
            min_length=n_new,
            include_prompt_in_result=False,
        )
        assert all(len(answer.sequences_ids[0]) == n_new for answer in made)
        return time.perf_counter() - start

    def log_probabilities(self, ids: list[int]) -> Tensor:
        logits = np.array(self.generator.forward_batch([ids]))[0]
        return torch.from_numpy(logits).double().log_softmax(-1)


PROGRAMS: dict[str, tuple[type[Program], dict[str, Any]]] = {
    "transformers fp32": (Transformers, {"dtype": "fp32"}),
    "transformers bf16": (Transformers, {"dtype": "bf16"}),
    "llama.cpp f32": (LlamaCpp, {"dtype": "fp32"}),
    "llama.cpp q8_0": (LlamaCpp, {"dtype": "q8_0"}),
    "ctranslate2 fp32": (CTranslate2, {"dtype": "fp32"}),
    "ctranslate2 int8": (CTranslate2, {"dtype": "int8"}),
    "nanogpt fp32": (Ours, {"dtype": "fp32"}),
    "nanogpt fp24": (Ours, {"dtype": "fp24"}),
    "nanogpt bf16": (Ours, {"dtype": "bf16"}),
    "nanogpt int8": (Ours, {"dtype": "int8"}),
    "nanogpt bf16 T=1": (Ours, {"dtype": "bf16", "temperature": 1.0}),
}


def missing(name: str) -> list[str]:
    """Return the packages that a program needs and that are not installed."""
    return [n for n in PROGRAMS[name][0].needs if importlib.util.find_spec(n) is None]


def write_files(names: list[str], files: Path) -> list[str]:
    """Write the checkpoint in the formats that the programs read; return the names of those.

    A program whose converter refuses the model is left out, and named.
    """
    readers = {"hf": (Transformers, CTranslate2), "gguf": (LlamaCpp,), "ct2": (CTranslate2,)}
    for kind, write in (("hf", _write_hf), ("gguf", _write_gguf), ("ct2", _write_ct2)):
        if own := [name for name in names if PROGRAMS[name][0] in readers[kind]]:
            try:
                write(files)
            except Exception as error:  # of another library's converter
                print(f"without {', '.join(own)}: {type(error).__name__}: {error}")
                names = [name for name in names if name not in own]
    return names


def _write_hf(files: Path) -> None:
    _export(files, "hf", "hf")


def _write_gguf(files: Path) -> None:
    llama_cpp = _quiet_llama_cpp()
    whole, small = files / "model.gguf", files / "model-q8_0.gguf"
    _export(files, whole.name, "gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = Q8_0
    assert llama_cpp.llama_model_quantize(str(whole).encode(), str(small).encode(), params) == 0


def _export(files: Path, name: str, form: str) -> None:
    if export([str(files / "model.ckpt"), str(files / name), "--format", form]):
        raise ValueError("it is not exported")


@lru_cache
def _quiet_llama_cpp() -> Any:
    """Return llama.cpp's functions, with its log turned off."""
    import llama_cpp

    llama_cpp.no_log = llama_cpp.llama_log_callback(lambda *_: None)  # must not be collected
    llama_cpp.llama_log_set(llama_cpp.no_log, ctypes.c_void_p(0))
    return llama_cpp


def _write_ct2(files: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(files / "hf")).convert(str(files / "ct2"))
