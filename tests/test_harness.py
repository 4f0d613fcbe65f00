"""lm-evaluation-harness: its tasks on our checkpoints, in process and through our server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt.checkpoint import load_checkpoint, record, write_checkpoint
from nanogpt.evaluate import main
from nanogpt.evaluation.results import mean_and_error
from nanogpt.evaluation.scoring import Request, encode_pair, loglikelihoods
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import byte_tokenizer
from nanogpt.tokenizer_files import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it brings
pytest.importorskip("lm_eval", reason='needs the extra: pip install -e ".[eval]"')

ROOT = Path(__file__).parent.parent
TOKENIZER = byte_tokenizer()
TASK = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{activity_label}}}}: {{{{ctx_a}}}} {{{{ctx_b.capitalize()}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def checkpoint_path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = GPTConfig(256, TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=32)
    weights = {f"model.{name}": 4 * tensor for name, tensor in GPT(config).state_dict().items()}
    content = {"nanogpt": record("pretrain", config, TOKENIZER), "global_step": 1}
    write_checkpoint({**content, "state_dict": weights}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.fixture
def items_path(tmp_path: Path) -> Path:
    """Items of two activities, and the harness's task of them."""
    rows = [
        {
            "activity_label": ("Cooking", "Sewing")[i % 2],
            "ctx": f"The pot holds {i} eggs. she",
            "ctx_a": f"The pot holds {i} eggs.",
            "ctx_b": "she",
            "endings": ["boils them all.", f"takes {i}", "leaves the kitchen", "sings"],
            "label": i % 4,
        }
        for i in range(12)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "local_hellaswag.yaml").write_text(TASK.format(path=path))
    return path


def instances(pairs: list[tuple[str, str]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


PAIRS = [
    ("The sky is", " blue"),
    ("The sky is ", "red"),
    ("", "A beginning"),
    ("x" * 300, " more than the context"),
    ("The sky is", " grey, as so often"),
]


def test_log_likelihoods_are_those_of_our_scorer(checkpoint_path: Path) -> None:
    from nanogpt.evaluation.harness import HarnessModel

    checkpoint = load_checkpoint(checkpoint_path)
    found = HarnessModel(checkpoint).loglikelihood(instances(PAIRS), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(PAIRS, found, strict=True):
        text = context.rstrip()
        request = Request(
            TOKENIZER.encode(text) or [TOKENIZER.eot_id],
            [TOKENIZER.encode(context[len(text) :] + continuation)],
        )
        [[ours]] = loglikelihoods(checkpoint.model, [request])
        assert value == pytest.approx(ours.loglikelihood, abs=1e-5)


def read_requests(items_path: Path) -> tuple[list[dict[str, Any]], list[Request]]:
    """Return the rows of items, and what the task requests of each."""
    rows = [json.loads(line) for line in items_path.read_text().splitlines()]
    requests = []
    for row in rows:
        text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        pairs = [encode_pair(TOKENIZER, text, f" {ending}") for ending in row["endings"]]
        requests.append(Request(pairs[0][0], [continuation for _, continuation in pairs]))
    return rows, requests


def test_a_task_in_process_gives_the_scores_of_our_scorer(
    checkpoint_path: Path, items_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    arguments = [str(checkpoint_path), "--json", str(out)]
    folder = ["--include-path", str(tmp_path)]
    assert (
        main([*arguments, "--task", "harness", "--harness-tasks", "local_hellaswag", *folder]) == 0
    )
    [theirs] = [row["results"] for row in json.loads(out.read_text())]
    rows, requests = read_requests(items_path)
    results = loglikelihoods(load_checkpoint(checkpoint_path).model, requests)
    sums = np.array([[found.loglikelihood for found in of] for of in results])
    sizes = np.array([[len(ending) for ending in row["endings"]] for row in rows])  # characters
    labels = np.array([row["label"] for row in rows])
    ours = mean_and_error("acc", sums.argmax(1) == labels)
    ours |= mean_and_error("acc_norm", (sums / sizes).argmax(1) == labels)
    assert theirs["local_hellaswag_examples"] == 12
    for name in ("acc", "acc_norm"):
        assert theirs[f"local_hellaswag_{name}"] == pytest.approx(ours[name])
        error = theirs[f"local_hellaswag_{name}_stderr"]
        assert error == pytest.approx(ours[f"{name}_stderr"])


def test_a_figure_without_a_formula_for_its_error_is_resampled(
    checkpoint_path: Path, items_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TASK.format(path=items_path).replace("multiple_choice", "loglikelihood")
    text = text.partition("doc_to_target")[0].replace("local_hellaswag", "words")
    (tmp_path / "words.yaml").write_text(text + 'doc_to_target: "{{ctx_b}}"\n')
    out = tmp_path / "out.json"
    folder = ["--include-path", str(tmp_path), "--json", str(out)]
    assert (
        main([str(checkpoint_path), "--task", "harness", "--harness-tasks", "words", *folder]) == 0
    )
    [row] = json.loads(out.read_text())
    assert row["results"]["words_perplexity_stderr"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # the table alone


def test_figures_of_several_filters_keep_their_names() -> None:
    from nanogpt.evaluation.harness import flat

    found: dict[str, dict[str, Any]] = {
        "gsm8k": {
            "alias": "gsm8k",
            "sample_len": 8,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.1,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "arc": {"acc,none": 0.75, "acc_stderr,none": 0.2},
    }
    assert flat(found) == {
        "gsm8k_examples": 8,
        "gsm8k_exact_match_strict-match": 0.25,
        "gsm8k_exact_match_strict-match_stderr": 0.1,
        "gsm8k_exact_match_flexible-extract": 0.5,
        "arc_acc": 0.75,
        "arc_acc_stderr": 0.2,
    }


@pytest.mark.parametrize(
    ("name", "found", "broken", "message"),
    [
        ("items.jsonl", '{"activity_label"', '{oops, "activity_label"', "JSON parse error"),
        ("local_hellaswag.yaml", "{{ctx_a}}", "{{ctx_a.no.thing}}", "has no attribute 'no'"),
        ("local_hellaswag.yaml", "acc_norm}]", "acc_norm", "files that are no YAML"),
    ],
)
def test_a_task_that_cannot_be_run_is_one_sentence(
    name: str,
    found: str,
    broken: str,
    message: str,
    checkpoint_path: Path,
    items_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from nanogpt.evaluation import harness

    own = partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", own)
    path = tmp_path / name
    path.write_text(path.read_text().replace(found, broken, 1))
    folder = ["--include-path", str(tmp_path)]
    arguments = ["--task", "harness", "--harness-tasks", "local_hellaswag", *folder]
    assert main([str(checkpoint_path), *arguments]) == 1
    [sentence] = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("nanogpt")
    ]
    assert message in sentence


def test_an_unknown_task_is_one_sentence(
    checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanogpt.evaluation import harness

    none = partial(harness.TaskManager, include_defaults=False)  # all of them take a while to read
    monkeypatch.setattr(harness, "TaskManager", none)
    assert main([str(checkpoint_path), "--task", "harness", "--harness-tasks", "no_such_task"]) == 1
    assert "has no task 'no_such_task'" in capsys.readouterr().err


@contextmanager
def serving(checkpoint_path: Path, folder: Path) -> Iterator[str]:
    """Serve a checkpoint in fp32; give the API's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = [f"checkpoint={checkpoint_path}", f"port={port}", "dtype=fp32", f"runs_dir={folder}"]
    environment = {k: v for k, v in os.environ.items() if k != "NANOGPT_API_KEYS"}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), *keys], cwd=folder, env=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not ready(url):
            assert server.poll() is None, "the server has left"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait()


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answered:
            return bool(answered.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_local_completions_through_the_server_give_the_same(
    checkpoint_path: Path, items_path: Path, tmp_path: Path
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    checkpoint = load_checkpoint(checkpoint_path)
    write_tokenizer(TOKENIZER, tmp_path, checkpoint.config.block_size, None)
    _, requests = read_requests(items_path)
    pairs = [
        (TOKENIZER.decode(request.context), TOKENIZER.decode(ending))
        for request in requests
        for ending in request.continuations
    ]
    with serving(checkpoint_path, tmp_path) as url:
        model: Any = LocalCompletionsAPI(
            base_url=f"{url}/completions",
            model="a",
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            max_length=checkpoint.config.block_size,
        )
        found = model.loglikelihood(instances(pairs), disable_tqdm=True)
    ours = [one for answers in loglikelihoods(checkpoint.model, requests) for one in answers]
    for (value, greedy), one in zip(found, ours, strict=True):
        assert value == pytest.approx(one.loglikelihood, abs=1e-4)
        assert greedy == one.is_greedy
