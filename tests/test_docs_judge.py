"""The judge of docs/EVALUATION.md, in a file outside the repository."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.checkpoint import record, write_checkpoint
from nanogpt.evaluate import main
from nanogpt.model import GPT, GPTConfig
from nanogpt.prompts import find_template
from nanogpt.tokenizer import byte_tokenizer
from tests.test_docs import blocks

COMMAND = ["a.ckpt", "--task", "my_judge.judge", "--data", "data.jsonl", "--json", "scores.json"]


@pytest.fixture
def answers() -> list[str]:
    """What the endpoint answers, one per request; without any it answers with status 500."""
    return []


@pytest.fixture
def requests(
    answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[dict[str, Any]]]:
    """The requests to the page's judge, in a folder with a model and three instructions."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if answers else 500)
            self.end_headers()
            if answers:
                choice = {"message": {"content": answers.pop(0)}}
                self.wfile.write(json.dumps({"choices": [choice]}).encode())

        def log_message(self, *args: Any) -> None:
            pass

    tokenizer = byte_tokenizer().with_special_tokens(find_template("chat").special_tokens)
    config = GPTConfig(64, tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
    torch.manual_seed(0)
    weights = {f"model.{name}": tensor for name, tensor in GPT(config).state_dict().items()}
    about = record("instruct", config, tokenizer, template="chat")
    checkpoint = {"nanogpt": about, "state_dict": weights, "global_step": 1}
    write_checkpoint(checkpoint, tmp_path / "a.ckpt")
    rows = [{"instruction": f"Echo {i}.", "response": f"{i}"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (code,) = blocks("docs/EVALUATION.md", "python")
    (tmp_path / "my_judge.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr("my_judge.URL", f"http://127.0.0.1:{server.server_port}/v1")
        yield received
        server.shutdown()
        thread.join()
    del sys.modules["my_judge"]


def test_the_score_is_the_mean_of_the_judges_numbers(
    requests: list[dict[str, Any]], answers: list[str]
) -> None:
    answers += ["70", " 80\n", "90"]
    assert main([*COMMAND, "--max-new-tokens", "3"]) == 0
    [row] = json.loads(Path("scores.json").read_text())
    assert row["results"] == {"score": 80.0, "score_stderr": pytest.approx(10 / 3**0.5)}
    [message] = requests[1]["messages"]
    assert "Instruction: Echo 1.\n\nA correct reply: 1\n" in message["content"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["8/10"], "llama3 answered '8/10', no number up to 100"),
        (["101"], "llama3 answered '101', no number up to 100"),
        ([], "gave no answer: Server error '500 Internal Server Error'"),
    ],
)
def test_an_answer_without_a_number_is_one_sentence(
    answer: list[str],
    message: str,
    requests: list[dict[str, Any]],
    answers: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers += answer
    assert main([*COMMAND, "--max-new-tokens", "3"]) == 1
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if "nanogpt" in line]
    assert message in sentence
    assert len(requests) == 1
