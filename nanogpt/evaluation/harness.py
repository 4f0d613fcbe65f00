"""Our checkpoints as a model of lm-evaluation-harness, so that any of its tasks runs on them.

    pip install -e ".[eval]"
    python -m nanogpt.evaluate RUN --task harness --harness-tasks arc_easy,lambada_openai

or, for what only its own interface offers:

    from nanogpt.evaluation.harness import HarnessModel
    lm_eval.simple_evaluate(HarnessModel(load_checkpoint("RUN")), tasks=["arc_easy"])
"""

import os
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanogpt.checkpoint import Checkpoint
from nanogpt.evaluation.results import STDERR, Results
from nanogpt.evaluation.scoring import BATCH_SIZE, Request, loglikelihoods
from nanogpt.generation import Reply
from nanogpt.text import first_line

MAX_NEW_TOKENS = 256  # by default
RESAMPLES = 100  # where a standard error has no formula; those of means have one


class HarnessModel(TemplateLM):
    """A checkpoint behind the harness's interface, with the log-likelihoods of our scorer."""

    eot_token_id, tokenizer_name = 0, ""  # properties without a setter in the base class

    def __init__(self, checkpoint: Checkpoint, batch_size: int = BATCH_SIZE) -> None:
        super().__init__()
        self.checkpoint, self.batch_size = checkpoint, batch_size
        self.max_length = checkpoint.config.block_size
        self.eot_token_id = checkpoint.tokenizer.eot_id
        self.tokenizer_name = checkpoint.tokenizer.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        tokenizer = self.checkpoint.tokenizer
        as_it_is = add_special_tokens is False or not string
        return tokenizer.encode(string) if as_it_is else tokenizer.encode_prompt(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score the requests, those of one context together."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, _) in enumerate(requests):
            groups[tuple(context)].append(i)
        batch = [Request(key, [requests[i][2] for i in group]) for key, group in groups.items()]
        results = loglikelihoods(self.checkpoint.model, batch, self.batch_size)
        found = dict(zip(chain(*groups.values()), chain(*results), strict=True))
        return [(found[i].loglikelihood, found[i].is_greedy) for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, in the harness's own disjoint windows."""
        sums = []
        for request in requests:
            ids = self.checkpoint.tokenizer.encode(*request.args)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs = map(make_disjoint_window, windows)
            batch = [Request(context, [scored]) for context, scored in pairs]
            results = loglikelihoods(self.checkpoint.model, batch, self.batch_size)
            sums.append(sum(one.loglikelihood for [one] in results))
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to one of the strings that end them."""
        texts = []
        for context, options in (request.args for request in requests):
            until = options.get("until") or []
            reply = Reply(
                *(self.checkpoint.model, self.checkpoint.tokenizer, context),
                stops=[until] if isinstance(until, str) else until,
                max_new_tokens=options.get("max_gen_toks", MAX_NEW_TOKENS),
                temperature=(options.get("do_sample") and options.get("temperature")) or 0.0,
                seed=0,
            )
            texts.append(reply.read().text)
        return texts


def evaluate(
    checkpoint: Checkpoint,
    limit: int | None,
    batch_size: int,
    harness_tasks: str,
    include_path: Path | None,
) -> Results:
    """Run tasks of lm-evaluation-harness, with commas between their names.

    The metrics are `<task>_<metric>`. Raises ValueError for an unknown task and for one that cannot
    be run.
    """
    tasks = harness_tasks.split(",")
    manager = find_tasks(tasks, include_path)
    model: Any = HarnessModel(checkpoint, batch_size)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # so few resamples are one worker's
    try:
        with redirect_stdout(sys.stderr):  # standard output is the table's
            found = lm_eval.simple_evaluate(
                model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=RESAMPLES,
            )
    except Exception as error:  # of the harness, datasets, jinja2 or a task's own code
        cause: BaseException = error
        while cause.__cause__ is not None:  # that of datasets has no reason of its own
            cause = cause.__cause__
        raise ValueError(
            f"lm-evaluation-harness could not run {harness_tasks} ({type(cause).__name__}: "
            f"{first_line(cause)}); look at the task files and their data"
        ) from error
    return flat(found["results"])


def find_tasks(tasks: list[str], folder: Path | None) -> TaskManager:
    """Return the manager of a folder's tasks or, where it lacks one, of the harness's too.

    The thousands of files of the latter take a while to read. Raises ValueError for an unknown
    task, and FileNotFoundError for a missing folder.
    """
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"--include-path {folder} is no folder of task files")
    for include_defaults in [True] if folder is None else [False, True]:
        path = None if folder is None else str(folder)
        manager = TaskManager(include_path=path, include_defaults=include_defaults)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise ValueError(
        f"lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, "
        "--include-path DIR adds those of a folder's files, but for files that are no YAML"
    )


def flat(found: dict[str, dict[str, Any]]) -> Results:
    """Return metrics by one name, with that of their filter where they have one.

    >>> flat({"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "gsm8k": {"exact,strict": 0.2}})
    {'arc_acc': 0.5, 'arc_acc_stderr': 0.1, 'gsm8k_exact_strict': 0.2}
    """
    results: Results = {}
    for task, metrics in found.items():
        for key, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                metric, _, filter_name = key.partition(",")
                name = "examples" if key == "sample_len" else metric.removesuffix(STDERR)
                parts = [task, name, "" if filter_name == "none" else filter_name]
                stderr = STDERR if metric.endswith(STDERR) else ""
                results["_".join(filter(None, parts)) + stderr] = value
    return results
