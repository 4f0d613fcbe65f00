"""The judge: stored answers are reused; silence and nonsense are errors of one sentence."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.checkpoint import record, write_checkpoint
from nanogpt.evaluate import main
from nanogpt.evaluation.judge import read_score
from nanogpt.model import GPT, GPTConfig
from nanogpt.prompts import find_template
from nanogpt.tokenizer import byte_tokenizer


@dataclass
class FakeJudge:
    """An OpenAI-compatible endpoint that gives prepared answers, the last of them for ever."""

    answers: list[str]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def judge() -> Iterator[FakeJudge]:
    fake = FakeJudge(["70"])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fake.requests.append(json.loads(body))
            fake.keys.append(self.headers["Authorization"])
            reply = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
            echo = {"error": f"with {self.headers['Authorization']}"}
            completion = {"choices": [{"message": {"content": reply}}]}
            answer = json.dumps(echo if reply in ("broken", "other") else completion).encode()
            self.send_response({"broken": 500, "moved": 302}.get(reply, 200))
            self.send_header("Location", f"{fake.url}/elsewhere")
            self.end_headers()
            self.wfile.write(b"not JSON" if reply == "no JSON" else answer)

        def do_GET(self) -> None:  # after a redirect
            fake.keys.append(self.headers["Authorization"])
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def arguments(tmp_path: Path, judge: FakeJudge) -> list[str]:
    """The command on a model of random weights and three instructions."""
    tokenizer = byte_tokenizer().with_special_tokens(find_template("chat").special_tokens)
    torch.manual_seed(0)
    config = GPTConfig(64, tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
    weights = {f"model.{name}": tensor for name, tensor in GPT(config).state_dict().items()}
    about = record("instruct", config, tokenizer, template="chat")
    write_checkpoint(
        {"nanogpt": about, "state_dict": weights, "global_step": 1}, tmp_path / "a.ckpt"
    )
    rows = [{"instruction": f"Echo {i}.", "response": f"{i}"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [
        *(str(tmp_path / "a.ckpt"), "--task", "judge", "--data", str(tmp_path / "data.jsonl")),
        *("--judge-url", judge.url, "--judge-model", "fake", "--judge-key", "sk-mine"),
        *("--json", str(tmp_path / "out.json"), "--max-new-tokens", "3"),
    ]


def answers(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize(
    "text",
    [
        '{"instruction": "a", "score": 1}\n{"instruction": "b", "score": 2}',
        '{"key": "a", "response": "b"}',
        '{"key": "mine", "score": 1}\n{"key": "mine", "score"',
        f'{{"key": "{"0" * 64}", "score": "high"}}',
        '[\n{"key": "a", "score": 1}\n]',
        "a text of one's own",
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    text: str,
    end: str,
    arguments: list[str],
    judge: FakeJudge,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(text + end)
    assert f"{path}, line 1 is no answer of a judge" in fails(
        [*arguments, "--answers", str(path)], capsys
    )
    assert path.read_text() == text + end
    assert not judge.requests


def test_answers_without_a_last_newline_are_all_reused(
    judge: FakeJudge, arguments: list[str], tmp_path: Path
) -> None:
    assert main(arguments) == 0
    path = tmp_path / "judge.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # by an editor
    assert main(arguments) == 0
    assert len(judge.requests) == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("n_bytes", [4, 100])
def test_a_torn_first_answer_is_requested_again(
    judge: FakeJudge, arguments: list[str], tmp_path: Path, n_bytes: int
) -> None:
    assert main(arguments) == 0
    path = tmp_path / "judge.jsonl"
    whole = path.read_bytes()
    torn = whole[:n_bytes]
    path.write_bytes(torn)
    assert main(arguments) == main(arguments) == 0
    assert path.read_bytes() == torn + b"\n" + whole


def test_replies_are_scored_and_answers_stored_verbatim(
    judge: FakeJudge, arguments: list[str], tmp_path: Path
) -> None:
    judge.answers = ["70", "Score: 80/100.", "**90**"]
    assert main(arguments) == 0
    [row] = json.loads((tmp_path / "out.json").read_text())
    assert row["results"]["score"] == 80.0
    assert row["results"]["score_stderr"] == pytest.approx(10 / 3**0.5)
    assert [one["answer"] for one in answers(tmp_path)] == ["70", "Score: 80/100.", "**90**"]
    assert judge.keys == ["Bearer sk-mine"] * 3
    prompt = judge.requests[1]["messages"][0]["content"]
    assert "Echo 1." in prompt
    assert answers(tmp_path)[1]["prompt"] == prompt


def test_answered_requests_are_not_sent_again(
    judge: FakeJudge, arguments: list[str], tmp_path: Path
) -> None:
    assert main(arguments) == main(arguments) == 0
    assert len(judge.requests) == 3
    path = tmp_path / "judge.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # killed in the last line
    assert main(arguments) == main(arguments) == 0
    assert len(judge.requests) == 4
    assert path.read_bytes() == whole[:-5] + b"\n" + whole.splitlines(keepends=True)[-1]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 1
    [sentence] = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("nanogpt")
    ]
    return sentence


def test_nonsense_ends_in_a_sentence_and_loses_nothing(
    judge: FakeJudge, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.answers = ["70", "a fine reply", "between 70 and 80", "a fine reply"]
    assert "gave no number from 0 to 100 in 3 attempts" in fails(arguments, capsys)
    assert [one["score"] for one in answers(tmp_path)] == [70, None, None, None]
    judge.answers = ["50"]
    assert main(arguments) == 0
    assert [one["score"] for one in answers(tmp_path)] == [70, None, None, None, 50, 50]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("broken", "500 Internal Server Error"),
        ("no JSON", "JSONDecodeError"),
        ("other", "KeyError: 'choices'"),
    ],
)
def test_a_broken_judge_is_one_sentence(
    answer: str,
    message: str,
    judge: FakeJudge,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    judge.answers = [answer]
    sentence = fails(arguments, capsys)
    assert message in sentence
    assert "sk-mine" not in sentence


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--judge-key", "sk-mi\nne", "has characters that no key has"),
        ("--judge-key", "sk-mine…", "has characters that no key has"),
        ("--judge-url", "no address", "'no address' is no address; pass http"),
        ("--judge-url", "http://[::1", "'http://[::1' is no address; pass http"),
        ("--judge-url", "http://127.0.0.1:port/v1", "is no address; pass http"),
        ("--judge-url", "http:///v1", "is no address; pass http"),
        ("--judge-url", "http://127.0.0.1:9/é", "gave no chat completion (ConnectError"),
    ],
)
def test_an_address_or_a_key_that_is_none_is_one_sentence(
    option: str, value: str, message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = fails([*arguments, option, value], capsys)
    assert message in sentence
    assert "sk-mi" not in sentence


def test_the_white_space_around_a_key_is_no_part_of_it(
    judge: FakeJudge, arguments: list[str]
) -> None:
    assert main([*arguments, "--judge-key", " sk-mine\r\n"]) == 0
    assert judge.keys == ["Bearer sk-mine"] * 3


def test_a_key_does_not_follow_a_redirect(
    judge: FakeJudge, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    judge.answers = ["moved"]
    assert "302 Found" in fails(arguments, capsys)
    assert judge.keys == ["Bearer sk-mine"]


def test_a_judge_that_is_not_there_is_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[arguments.index("--judge-url") + 1] = "http://127.0.0.1:9/v1"
    assert "gave no chat completion (ConnectError" in fails(arguments, capsys)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("85", 85),
        (" 0\n", 0),
        ("100", 100),
        ("Score: 85.", 85),
        ("85/100", 85),
        ("85 out of 100", 85),
        ("I give it 85, so: 85", 85),
        ("85%", 85),
        ("85 points.", 85),
        ("85. The reply is right.", 85),
        ("85/100, for the reply is right", 85),
        ("85\n\nThe reply is right and", 85),
        ("101", None),
        ("8.5", None),
        ("-5", None),
        ("between 70 and 80", None),
        ("1000", None),
        ("8/10", None),
        ("Score: 9/10.", None),
        ("10 out of 10", None),
        ("70-80", None),
        ("70 - 80", None),
        ("70–80", None),
        ("4 stars", None),
        ("The reply makes 2 mistakes,", None),
        ("1. Accuracy: the reply is", None),
        ("100-point scale: poor", None),
        ("good", None),
        ("", None),
    ],
)
def test_a_score_is_one_whole_number(answer: str, score: int | None) -> None:
    assert read_score(answer) == score
