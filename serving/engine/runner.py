"""One model at work: its weights, its slots and its sequences, computed step by step."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.checkpoint import Checkpoint, load_checkpoint
from nanogpt.classifier import enclose
from nanogpt.command import out_of_memory
from nanogpt.support import mixes_by_attend
from serving.engine import sampling
from serving.engine.compiling import processor_flags
from serving.engine.decoding import Begun, Decoder
from serving.engine.forward import Forward, Span
from serving.engine.grammar import Grammars
from serving.engine.messages import (
    Classified,
    Classify,
    Computation,
    Describe,
    Embed,
    Embedded,
    EngineError,
    Failed,
    Generate,
    Message,
    ModelDetails,
    Score,
    Settings,
    Stats,
    Tokens,
)
from serving.engine.native import ForwardPass, bf16_gain, cache_dtype, make_forward, supported
from serving.engine.registry import Entry
from serving.engine.scheduler import Scheduler, SequenceState
from serving.engine.slots import Slots, slot_bytes
from serving.logs import of_request

MIN_TOKENS = 8  # of a prefill in one step where memory is short
# The most slots and the tokens of a chunk by default. A GPU reads its weights in the time of some
# hundred rows' arithmetic.
DEFAULTS = {"cpu": (32, 64), "cuda": (256, 1024)}
FREE_SHARE = 0.8  # of a GPU's memory after the weights, for keys and values
RETRY_S = 30.0  # steps wait for the host after one that could not be begun ahead
FIXED_POINT = 2**32  # sums of integers are the same however a text is divided into steps
WORTH_BF16 = 1.2  # bf16 must be this many times as fast as fp32 to be worth its rounding

log = logging.getLogger(__name__)
T = TypeVar("T")
Computed = tuple[SequenceState, Tensor]  # and its states (R, C) of a step
Emit = Callable[[object, Message], None]  # to a client, or to all for None


@dataclass(eq=False)
class Runner:
    """A loaded model. What fails in a step fails for the sequence that causes it alone.

    After an error of the GPU itself nothing can be computed: it ends the engine's process.
    """

    entry: Entry
    checkpoint: Checkpoint
    dtype: str
    forward: ForwardPass
    scheduler: Scheduler
    stats: Stats
    emit: Emit
    used: float = 0.0  # the time of its latest request or step

    def __post_init__(self) -> None:
        self.grammars, forward = Grammars(self.checkpoint.tokenizer), self.forward
        self.decoder: Decoder | None = None
        if isinstance(forward, Forward) and forward.device.type == "cuda":
            self.decoder = Decoder(forward)
        self._begun: Begun | None = None  # a step that the GPU computes
        self._ahead_from = 0.0  # the time before which none is begun ahead

    def prepared(self, request: Computation | Describe, on_ready: Callable[[], None]) -> bool:
        """Return whether a request can begin; `on_ready` is called when its grammar is compiled."""
        grammar = request.params.grammar if isinstance(request, Generate) else ""
        return not grammar or self.grammars.ready(grammar, on_ready)

    def add(self, client: object, request: Computation) -> None:
        """Queue a request; raises EngineError for a prompt that the model cannot compute."""
        about, ids = self.checkpoint, list(request.prompt_ids)
        block_size, vocab_size = about.config.block_size, about.config.vocab_size
        if isinstance(request, Classify):
            ids = enclose(ids, about.tokenizer.eot_id, block_size, about.around)
        if len(ids) + isinstance(request, Generate) > block_size:
            what = f"The model's context is {block_size} tokens and the prompt has {len(ids)}"
            raise EngineError("context_length", f"{what}; shorten it.")
        if not ids or min(ids) < 0 or max(ids) >= vocab_size:
            what = f"A prompt has at least one token, of ids from 0 to {vocab_size - 1}."
            raise EngineError("invalid", what)
        grammar = request.params.grammar if isinstance(request, Generate) else ""
        try:
            matcher = self.grammars.matcher(grammar)
        except ValueError as error:
            raise EngineError("invalid", f"The grammar cannot be followed: {error}.") from error
        n_new = request.params.max_tokens if isinstance(request, Generate) else 0
        n_max = min(block_size, len(ids) + n_new)
        self.scheduler.waiting.append(SequenceState(request, client, ids, n_max, matcher))

    def details(self, request_id: str) -> ModelDetails:
        """Return the facts about the model that a front end needs."""
        about = self.checkpoint
        return ModelDetails(
            request_id,
            revision=self.entry.revision,
            stage=about.stage,
            step=about.step,
            block_size=about.config.block_size,
            vocab_size=about.config.vocab_size,
            n_embd=about.config.n_embd,
            n_params=about.model.num_parameters(),
            dtype=self.dtype,
            tokenizer=about.tokenizer.record(),
            template=about.template,
            labels=about.labels,
        )

    def step(self) -> None:
        """Compute the next tokens, and emit the messages about them."""
        self.scheduler.admit()
        if not self.scheduler.running:
            return
        self.stats.steps += 1
        self.used = time.monotonic()
        if self._step_ahead():
            return
        plan = self.scheduler.plan()
        ready: list[Computed] = []
        for sequence, states in self._isolated(self._forward, plan):
            is_whole = sequence.n_computed == len(sequence.ids)
            if isinstance(sequence.request, Score):
                self._isolated(self._score, [(sequence, states)])
            elif isinstance(sequence.request, Embed):
                self._isolated(self._embed, [(sequence, states)])
            elif is_whole and isinstance(sequence.request, Classify):
                self._isolated(self._classify, [(sequence, states)])
            elif is_whole:
                ready.append((sequence, states[-1:] if len(states) > 1 else states))
        self._isolated(self._sample, ready)

    def _step_ahead(self) -> bool:
        """Begin a step on the GPU where it can be done, and then read the one before.

        Return whether it can, and nothing else is to be computed now.
        """
        before, self._begun, running = self._begun, None, self.scheduler.running
        decoder = self.decoder if time.monotonic() >= self._ahead_from else None
        goes_on = decoder is not None and decoder.takes(running)
        unfinished = [s for s in running if len(s.ids) + s.n_ahead < s.max_ids]
        if decoder and goes_on and unfinished:
            try:
                self._begun = decoder.begin(unfinished)
            except Exception:
                log.exception("steps wait for the host for %.0f s", RETRY_S)
                self._ahead_from, goes_on = time.monotonic() + RETRY_S, False
        for drawn in before.drawn() if before else []:
            self._isolated(self._read, [drawn])
        return goes_on

    def _read(self, drawn: list[tuple[SequenceState, list[float]]]) -> None:
        """Append the token that a GPU drew; where it needs more candidates, have it drawn again."""
        ((sequence, row),) = drawn
        sequence.n_ahead -= 1
        if tokens := sampling.drawn_tokens(sequence, row):
            self._append(sequence, tokens)
        else:
            sequence.is_flat = True
            sequence.n_ahead, sequence.n_computed = 0, len(sequence.ids) - 1

    def _isolated(
        self, compute: Callable[[list[Any]], list[T] | None], items: list[Any]
    ) -> list[T]:
        """Return the results of all items; where that raises, of each that succeeds alone."""
        try:
            return (compute(items) or []) if items else []
        except Exception as error:
            if len(items) > 1:
                return [result for item in items for result in self._isolated(compute, [item])]
            self._fail(items[0][0], error)
            return []

    def _forward(self, plan: list[tuple[SequenceState, Span]]) -> list[Computed]:
        try:
            states = self.forward.hidden_states([span for _, span in plan])
        except Exception as error:
            if len(plan) == 1 and out_of_memory(error) and self._halve(*plan[0]):
                return self._forward([(s, s.next_span(len(span.ids))) for s, span in plan])
            raise
        parts = states.split([len(span.ids) for _, span in plan])
        for sequence, span in plan:
            sequence.n_computed += len(span.ids)
            if not sequence.first_token and sequence.n_computed == len(sequence.ids):
                assert sequence.slot is not None
                self.scheduler.slots.hold(sequence.slot, sequence.ids)  # others may use it now
        return [(sequence, part) for (sequence, _), part in zip(plan, parts, strict=True)]

    def _halve(self, sequence: SequenceState, span: Span) -> bool:
        """Halve a sequence's tokens per step; return whether that could be done.

        Its answer stays the same: states do not depend on how a text is cut.
        """
        if len(span.ids) <= MIN_TOKENS:
            return False
        sequence.max_tokens = max(MIN_TOKENS, len(span.ids) // 2)
        what, extra = "out of memory; %d tokens at a time", of_request(sequence.request.request_id)
        log.warning(what, sequence.max_tokens, extra=extra)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _sample(self, ready: list[Computed]) -> None:
        logits = self.forward.logits(torch.cat([states for _, states in ready]))
        sequences = [sequence for sequence, _ in ready]
        for sequence, tokens in zip(sequences, sampling.choose(logits, sequences), strict=True):
            self._append(sequence, tokens)

    def _append(self, sequence: SequenceState, tokens: Tokens) -> None:
        """Append a token to an answer, which may end it."""
        now, stats = time.monotonic(), self.stats
        if sequence.first_token:
            stats.inter_token_s.add(now - sequence.last_token)
        else:
            sequence.first_token = now
            stats.queue_s.add(sequence.queue_s)
            stats.first_token_s.add(now - sequence.arrived)
            stats.prompt_tokens += sequence.n_prompt
            stats.cached_tokens += sequence.n_cached
        sequence.last_token = now
        params, (token,) = sequence.params, tokens.ids
        if token in params.stop_ids and not params.ignore_eos:
            tokens = sequence.tokens([])
            tokens.finish_reason = "stop"
        else:
            sequence.ids.append(token)
            stats.completion_tokens += 1
            if sequence.matcher and sequence.matcher.take(token):
                tokens.finish_reason = "stop"
            elif len(sequence.ids) >= sequence.max_ids:
                tokens.finish_reason = "length"
        if tokens.finish_reason is None:
            self.emit(sequence.client, tokens)
        else:
            self._end(sequence, tokens)

    def _end(self, sequence: SequenceState, answer: Message) -> None:
        self.scheduler.remove(sequence)
        self.stats.finished += 1
        if not sequence.generates:
            self.stats.prompt_tokens += sequence.n_prompt
            self.stats.cached_tokens += sequence.n_cached
        self.emit(sequence.client, answer)

    def _fail(self, sequence: SequenceState, error: Exception) -> None:
        self.scheduler.remove(sequence, clean=False)
        self.stats.failed += 1
        request_id = sequence.request.request_id
        if not isinstance(error, EngineError):
            log.error("a request failed", exc_info=error, extra=of_request(request_id))
            why = f"The answer could not be computed ({type(error).__name__}: {error})."
            error = EngineError("overloaded" if out_of_memory(error) else "internal", why)
        self.emit(sequence.client, Failed(request_id, error.kind, str(error)))

    def _score(self, computed: list[Computed]) -> None:
        """Add the log-probabilities of the step's tokens; return all after the last."""
        ((sequence, states),) = computed
        assert isinstance(sequence.request, Score)
        first = sequence.n_computed - len(states) + 1  # the position after the first state
        n_unscored = max(sequence.request.start - first, 0)
        following = sequence.ids[first + n_unscored : sequence.n_computed + 1]
        if first == 1 and not sequence.request.start:
            sequence.scored = [(None, [], [])]  # of the first token
        if following:
            logits = self.forward.logits(states[n_unscored:])[: len(following)]
            n_top = [sequence.request.top] * len(following)
            sequence.scored += sampling.log_probabilities(logits, following, n_top)
        if sequence.n_computed == len(sequence.ids):
            request_id = sequence.request.request_id
            self._end(sequence, Tokens(request_id, [], sequence.scored, finish_reason="length"))

    def _embed(self, computed: list[Computed]) -> None:
        """Add the step's states to the text's sum; return its direction after the last."""
        ((sequence, states),) = computed
        states = states.cpu().double()
        if not states.abs().max() * len(sequence.ids) < 2**63 / FIXED_POINT:
            raise ValueError("the hidden states are not finite, or too large to add")
        sequence.state_sum = sequence.state_sum + (states * FIXED_POINT).long().sum(0)
        if sequence.n_computed == len(sequence.ids):
            vector = F.normalize(sequence.state_sum.double(), dim=0).numpy().astype("<f4")
            self._end(sequence, Embedded(sequence.request.request_id, vector.tobytes()))

    def _classify(self, computed: list[Computed]) -> None:
        ((sequence, states),) = computed
        (probabilities,) = self.forward.class_probabilities(states[-1:]).tolist()
        request_id = sequence.request.request_id
        self._end(sequence, Classified(request_id, probabilities, sequence.n_prompt))


def load_runner(
    entry: Entry,
    settings: Settings,
    stats: Stats,
    emit: Emit,
    cache_bytes: float,
    n_models: int = 1,
) -> Runner:
    """Load an entry's checkpoint and make it ready to compute.

    It has as many slots, of `max_slots`, as a model's share of `cache_bytes` holds, and on a GPU
    the free memory: at least one.

    Raises ValueError or FileNotFoundError for a file that is none of ours, ValueError for a model
    of which not one slot fits `cache_bytes`, or with a block that breaks `Block`'s contract.
    """
    started = time.monotonic()
    device = choose_device(settings.device)
    checkpoint = load_checkpoint(entry.path, device=device, allow_modules=settings.allow_modules)
    is_native = settings.dtype == "auto" and supported(checkpoint.model, "bf16", device)
    dtype = choose_dtype(settings.dtype, device, is_native=is_native)
    if not mixes_by_attend(checkpoint.model):
        raise ValueError(f"{entry.path} has a block that mixes tokens in another way than `attend`")
    config, precision = checkpoint.config, cache_dtype(dtype)
    n_bytes = slot_bytes(config, precision)
    if device.type == "cuda":
        cache_bytes = min(cache_bytes, FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    if n_bytes > cache_bytes:
        raise ValueError(
            f"the keys and values of block_size={config.block_size} tokens take "
            f"{n_bytes / 1e9:.1f} GB, more than the {cache_bytes / 1e9:.1f} GB there are for all "
            f"models; raise cache_gb"
        )
    max_slots, chunk_tokens = DEFAULTS.get(device.type, DEFAULTS["cpu"])
    max_slots, chunk_tokens = settings.max_slots or max_slots, settings.chunk_tokens or chunk_tokens
    n_slots = max(1, min(max_slots, int(cache_bytes / n_models // n_bytes)))
    slots = Slots(config, n_slots, precision, device)
    model = checkpoint.model.requires_grad_(False)
    forward = make_forward(model, slots.cache, dtype, invariant=settings.invariant)
    log.info("loaded %s (%s) in %.1f s", entry.id, dtype, time.monotonic() - started)
    scheduler = Scheduler(slots, chunk_tokens)
    return Runner(entry, checkpoint, dtype, forward, scheduler, stats, emit)


def choose_device(device: str) -> torch.device:
    """Return the device of a setting; `auto` is the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def check_device(device: str) -> None:
    """Raise ValueError for a device that this machine does not have."""
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    mps = ["mps"] * torch.backends.mps.is_available()
    known = ", ".join(["auto", "cpu", *mps, *["cuda"][: len(gpus)], *gpus])
    if device not in known.split(", "):
        raise ValueError(f"device={device} is not on this machine; choose from {known}")


def choose_dtype(dtype: str, device: torch.device, *, is_native: bool = True) -> str:
    """Return the weights' precision; `auto` is bf16 where that is faster here, else fp32.

    A model that is not native runs in torch, not in the C++ kernels.
    """
    if dtype != "auto":
        return dtype
    if is_native and device.type == "cpu" and (gain := bf16_gain()) is not None:
        is_fast = gain >= WORTH_BF16
        log.info("dtype=auto: products in bf16 run %.2f times as fast as in fp32", gain)
    elif device.type == "cpu":
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
