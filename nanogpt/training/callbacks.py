"""What happens between optimizer steps: figures, validation, samples, and leaving on a signal.

All intervals are optimizer steps. The callbacks run in this order; checkpoints come after them.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from nanogpt.evaluation import hellaswag
from nanogpt.generation import check_sampling, generate
from nanogpt.prompts import Message, Template
from nanogpt.tokenizer import Tokenizer
from nanogpt.training.checkpointing import Checkpointing
from nanogpt.training.module import Batch, StageModule, is_due


class Figures(Callback):
    """Read the training figures every n steps and hand them to the loggers."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, StageModule)
        step = trainer.global_step
        if not is_due(step, self.every_n_steps, trainer) and step != 1:
            return
        figures = pl_module.read_figures()
        names = {"loss": "train/loss", "grad_norm": "train/grad_norm"}
        for logger in trainer.loggers:
            logger.log_metrics(
                {names.get(k, k): v for k, v in figures.items() if k != "step"}
                | {"wall_s": pl_module.wall_s()},
                step,
            )


class Validation(Callback):
    """Score a fixed part of the validation set every n steps, and another at the end.

    `tokens` and `final_tokens` size the parts; None is all of it.
    """

    def __init__(
        self,
        batches: Callable[[int | None], Iterable[Batch]],
        *,
        every_n_steps: int,
        tokens: int | None,
        final_tokens: int | None,
    ) -> None:
        self.batches = batches
        self.every_n_steps = every_n_steps
        self.tokens = tokens
        self.final_tokens = final_tokens

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, StageModule)
        step = trainer.global_step
        if not is_due(step, self.every_n_steps, trainer):
            return
        tokens = self.final_tokens if step == trainer.max_steps else self.tokens
        with pl_module.off_the_clock():
            pl_module.validation = pl_module.evaluate(self.batches(tokens))
            # A loss over another part of the set is no candidate for the best.
            pl_module.validated_at = step if tokens == self.tokens else -1
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{k}": v for k, v in pl_module.validation.items()}, step)


class HellaSwag(Callback):
    """Score HellaSwag every n steps and at the end, each rank its share of the items.

    In fp32, as `python -m nanogpt.evaluate` does: the last figures are those of the checkpoint.
    """

    def __init__(
        self,
        items: Sequence[hellaswag.Item],
        tokenizer: Tokenizer,
        *,
        every_n_steps: int,
    ) -> None:
        self.items = items
        self.tokenizer = tokenizer
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, StageModule)
        step = trainer.global_step
        if not is_due(step, self.every_n_steps, trainer):
            return
        with pl_module.off_the_clock():
            pl_module.model.eval()
            figures = hellaswag.completion_scores(pl_module.model, self.tokenizer, self.items)
            pl_module.model.train()
        for logger in trainer.loggers:
            logger.log_metrics({f"hellaswag/{k}": v for k, v in figures.items()}, step)


class Samples(Callback):
    """Write what the model says every n steps and at the end: same prompts, same seed.

    With a template the prompts are a user's messages, and the model first replies to them before
    any step.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        *,
        every_n_steps: int,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        seed: int,
        template: Template | None = None,
    ) -> None:
        check_sampling(max_new_tokens, temperature, top_k)
        self.path = path
        self.tokenizer = tokenizer
        self.every_n_steps = every_n_steps
        self.prompts = prompts
        self.template = template
        self.options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "seed": seed,
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        if self.template is not None and trainer.global_step == 0 and trainer.is_global_zero:
            self.path.unlink(missing_ok=True)  # of a start that reached no checkpoint
            self.write(pl_module, 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if not self.prompts or not is_due(step, self.every_n_steps, trainer):
            return
        assert isinstance(pl_module, StageModule)
        with pl_module.off_the_clock():
            if trainer.is_global_zero:
                self.write(pl_module, step)

    def write(self, module: StageModule, step: int) -> None:
        """Append the continuations of all prompts, or the replies to them, to samples.txt."""
        say = self.continuation if self.template is None else self.reply
        texts = [say(module, prompt) for prompt in self.prompts]
        text = "\n---\n".join(texts)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"=== step {step} ===\n{text}\n")

    def continuation(self, module: StageModule, prompt: str) -> str:
        """Return the prompt with its continuation; an empty prompt begins a document."""
        ids = self.tokenizer.encode_prompt(prompt)
        options: Any = self.options
        new_ids = generate(module.model, ids, stop_ids=[self.tokenizer.eot_id], **options)
        return prompt + self.tokenizer.decode(list(new_ids))

    def reply(self, module: StageModule, prompt: str) -> str:
        """Return the prompt and, on the next line, the model's reply to it as a message."""
        assert self.template is not None
        asked = [Message("user", prompt)]
        ids, _ = self.template.encode(self.tokenizer, asked, add_generation_prompt=True)
        options: Any = self.options
        stop_ids = self.template.stop_ids(self.tokenizer)
        new_ids = generate(module.model, ids, stop_ids=stop_ids, **options)
        reply = self.template.until_stop(self.tokenizer.decode(list(new_ids)))
        return f"> {prompt}\n{reply or '(it ends its reply at once)'}"


class StopSignals(Callback):
    """On SIGTERM or SIGINT finish the step, write the checkpoint and leave.

    A second SIGINT leaves at once.

    The ranks agree on the step without waiting: each starts a reduction of its flag over gloo and
    reads the previous step's.
    """

    def __init__(self, checkpointing: Checkpointing) -> None:
        self.checkpointing = checkpointing
        self.received: int | None = None
        self.stopped_by: int | None = None
        self._reduction: tuple[Any, torch.Tensor] | None = None

    @contextlib.contextmanager
    def instead_of_lightnings(self, trainer: Trainer) -> Iterator[None]:
        """Handle the signals here while the trainer runs.

        Lightning's handler would broadcast from inside the handler, and before every step it would
        ask all ranks and wait for the device's answer.
        """
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = lambda: None
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = lambda: None
        before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            os._exit(128 + signum)  # asked twice: at once
        self.received = signum

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        signum = self._agreed()
        if signum and trainer.global_step < trainer.max_steps:
            self.stopped_by = signum
            self.checkpointing.save(trainer, pl_module)
            trainer.should_stop = True

    def _agreed(self) -> int:
        """Return the signal that a rank had received by the previous step, 0 for none."""
        if not dist.is_initialized():
            return self.received or 0
        agreed = 0
        if self._reduction is not None:
            work, flag = self._reduction
            work.wait()
            agreed = int(flag.item())
        flag = torch.tensor(self.received or 0)
        self._reduction = (dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag)
        return agreed
