"""Health, readiness, metrics, logs."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from starlette.testclient import TestClient

from serving.api.settings import ApiSettings
from serving.app import create_app
from serving.engine.client import EngineClient
from serving.engine.messages import (
    Classify,
    Describe,
    Embed,
    Generate,
    Message,
    ModelInfo,
    Score,
    Stats,
    to_frame,
)
from serving.logs import JsonFormatter
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, hang_up, serve

LABELS = r'\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\}'
SAMPLE = re.compile(rf"(nanogpt|process)_[a-z_]+({LABELS})? [0-9.e+-]+")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(
        FakeEngine(f"unix:{tmp_path_factory.mktemp('engine')}/e", reply=fixed_reply("a"))
    ) as at:
        yield at


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_it_is_well(url: str, path: str) -> None:
    assert httpx.get(url + path).status_code == 200
    assert httpx.head(url + path).status_code == 200


def test_without_its_engine_the_server_lives_but_is_not_ready(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e")
    with serve(engine) as url:
        assert engine._server is not None
        engine._server.get_loop().call_soon_threadsafe(engine._server.close)
        hang_up(engine)
        assert eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "engine": "down"}
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert "nanogpt_engine_up 0" in httpx.get(f"{url}/metrics").text
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


class Hung(FakeEngine):
    """An engine whose computing thread stands still after one heartbeat."""

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        writer.write(to_frame([Stats()]))

    def _receive(self, message: Message, writer: asyncio.StreamWriter) -> None:
        self.requests.append(message)


def test_with_an_engine_that_hangs_the_server_is_not_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(Hung(f"unix:{tmp_path}/e"), ApiSettings(stall_s=2)) as url:
        assert httpx.get(f"{url}/ready").status_code == 200
        assert eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert "nanogpt_engine_up 0" in httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/v1/system_info").json()["engine"] is None
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "engine": "stalled"}
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert [r.message for r in caplog.records if "not responded" in r.message] == [
        "the engine has not responded for 2 s; new requests are refused"
    ]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 503),
        ("GET", "/v1/models/tiny", 503),
        ("POST", "/v1/completions", 503),
        ("POST", "/classify", 503),
        ("GET", "/v1/runs", 200),
        ("GET", "/v1/system_info", 200),
        ("GET", "/health", 200),
    ],
)
def test_while_the_engine_starts_models_are_not_there_yet(
    tmp_path: Path, method: str, path: str, status: int
) -> None:
    settings = ApiSettings(runs_dir=str(tmp_path))
    app = create_app(settings, EngineClient(f"unix:{tmp_path}/nowhere"))
    with TestClient(app, "http://127.0.0.1") as client:
        body = {"model": "tiny", "prompt": "x", "input": "x"} if method == "POST" else None
        answer = client.request(method, path, json=body)
    assert answer.status_code == status
    if status == 503:
        assert answer.json()["error"]["code"] == "unavailable"
        assert answer.headers["retry-after"]


def test_a_name_is_found_however_its_accents_are_composed(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e")
    engine.models = [replace(engine.models[0], aliases=["caf\u00e9"])]
    with serve(engine) as url:
        body = {"model": "cafe\u0301", "prompt": "x", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


def test_labels_come_from_a_classifier_where_the_default_is_none(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", labels=["ham", "spam"])
    text = replace(engine.models[0], default_for=[None, "generate"])
    spam = ModelInfo("spam", [], 2, "2", True, ["classify"])
    engine.models = [text, spam]
    with serve(engine) as url:
        assert httpx.post(f"{url}/predict", json={"input_data": "x"}).status_code == 200
        assert httpx.post(f"{url}/v1/classify", json={"input": "x"}).status_code == 200
    described = [message.model for message in engine.requests if isinstance(message, Describe)]
    assert described == ["spam"]


def test_who_names_no_model_has_texts_from_one_that_generates(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("a"))
    classifier = ModelInfo("spam", [], 2, "2", False, [None, "classify"])
    engine.models = [classifier, replace(engine.models[0], default_for=["generate"])]
    messages = [{"role": "user", "content": "x"}]
    with serve(engine) as url:
        answers = [
            httpx.post(f"{url}/v1/completions", json={"prompt": "x"}),
            httpx.post(f"{url}/v1/chat/completions", json={"model": "", "messages": messages}),
        ]
        httpx.post(f"{url}/classify", json={"input": "x"})
        counted = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()
        assert counted["count"] == answers[1].json()["usage"]["prompt_tokens"]
    assert [answer.json()["model"] for answer in answers] == ["tiny", "tiny"]
    described = [message.model for message in engine.requests if isinstance(message, Describe)]
    assert described == ["tiny", "spam"]


def test_metrics_are_what_prometheus_reads(url: str) -> None:
    httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [line for line in answer.text.splitlines() if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in samples)
    names = {line.split("{")[0].split(" ")[0] for line in samples}
    for name in ("queued", "slots_used", "completion_tokens_total"):
        assert f"nanogpt_engine_{name}" in names
    assert "nanogpt_time_to_first_token_seconds_bucket" in names
    assert "nanogpt_inter_token_seconds_count" in names
    assert any('path="/completions",status="200"' in line for line in samples)


def test_unknown_paths_share_one_label(url: str) -> None:
    httpx.get(f"{url}/one")
    httpx.get(f"{url}/two")
    text = httpx.get(f"{url}/metrics").text
    assert 'path="unknown",status="404"' in text
    assert "/one" not in text


def test_the_index_lists_the_routes(url: str) -> None:
    paths = {route["path"] for route in httpx.get(f"{url}/v1").json()["data"]}
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/system_info"} <= paths


def test_a_model_is_described(url: str) -> None:
    about = httpx.get(f"{url}/v1/models/run/tiny").json()
    assert (about["id"], about["max_model_len"], about["object"]) == ("tiny", 1024, "model")
    assert isinstance(about["created"], int)


@pytest.mark.parametrize(
    ("labels", "capabilities"),
    [
        (None, {"chat", "completion", "structured_output", "tools", "embeddings", "choice"}),
        (["ham", "spam"], {"classification", "embeddings", "choice"}),
    ],
)
def test_a_model_s_routes_answer_for_what_it_can_do_and_the_others_refuse(
    tmp_path: Path, labels: list[str] | None, capabilities: set[str]
) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    tool = {"type": "function", "function": {"name": "f"}}
    choice = {"type": "choice", "criteria": {"ham": None, "spam": None}}
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": ("/v1/chat/completions", chat),
        "completion": ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        "structured_output": ("/v1/completions", {"prompt": "x", "guided_regex": "x*"}),
        "tools": (
            "/v1/chat/completions",
            {**chat, "tools": [tool], "tool_choice": "required"},
        ),
        "embeddings": ("/v1/embeddings", {"input": "x"}),
        "choice": ("/v1/systemone", {"state": "x", "questions": {"q": choice}}),
        "classification": ("/classify", {"input": "x"}),
    }
    with serve(FakeEngine(f"unix:{tmp_path}/e", labels=labels)) as url:
        (listed,) = httpx.get(f"{url}/v1/models").json()["data"]
        posted = {name: httpx.post(url + path, json=body) for name, (path, body) in bodies.items()}
    assert set(listed["capabilities"]) == capabilities
    assert {name for name, answer in posted.items() if answer.status_code == 200} == capabilities


def test_the_page_or_its_stead_is_at_the_root(url: str) -> None:
    assert httpx.get(url).status_code == 200


def test_a_request_is_logged_without_its_text(url: str, caplog: pytest.LogCaptureFixture) -> None:
    def logged(request_id: str) -> list[str]:
        lines = [JsonFormatter().format(r) for r in caplog.records if r.name == "nanogpt.access"]
        return [line for line in lines if json.loads(line).get("request_id") == request_id]

    with caplog.at_level(logging.INFO, "nanogpt.access"):
        body = {"prompt": "a secret", "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=body, headers={"X-Request-ID": "mine"})
        assert eventually(lambda: logged("mine"))
    (text,) = logged("mine")
    line = json.loads(text)
    assert (line["status"], line["model"]) == (200, "tiny")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (8, 1)
    assert "secret" not in text


@pytest.mark.parametrize(
    ("path", "body", "labels"),
    [
        ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1, "n": 2}, None),
        ("/classify", {"input": "x"}, ["ham", "spam"]),
        ("/v1/embeddings", {"input": "x"}, None),
        (
            "/v1/systemone",
            {"state": "x", "questions": {"q": {"type": "choice", "criteria": {"a": "", "b": ""}}}},
            None,
        ),
    ],
)
def test_the_ids_of_engine_requests_begin_with_that_of_the_http_request(
    tmp_path: Path, path: str, body: dict[str, Any], labels: list[str] | None
) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", labels=labels)
    with serve(engine) as url:
        for _ in range(2):
            httpx.post(url + path, json=body, headers={"X-Request-ID": "mine"}).raise_for_status()
    kinds = Generate | Score | Classify | Embed
    ids = [m.request_id for m in engine.requests if isinstance(m, kinds)]
    assert ids
    assert all(request_id.startswith("mine-") for request_id in ids)
    assert len(set(ids)) == len(ids)


def test_log_prompts_writes_the_prompts_to_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nanogpt.access")
    with serve(FakeEngine(f"unix:{tmp_path}/e"), ApiSettings(log_prompts=True)) as url:
        httpx.post(f"{url}/v1/completions", json={"prompt": "a secret", "max_tokens": 1})
        assert eventually(lambda: caplog.records)
    assert any(getattr(r, "fields", {}).get("prompts") == {0: "a secret"} for r in caplog.records)


def test_a_log_line_is_one_line_whatever_it_quotes() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\nb\u2028c", None, None)
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == "a\nb\u2028c"


def test_concurrent_requests_share_one_description_of_a_model(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("a"))
    with serve(engine) as url, ThreadPoolExecutor(8) as pool:
        body = {"prompt": "x"}
        futures = [pool.submit(httpx.post, f"{url}/v1/completions", json=body) for _ in range(8)]
        assert {future.result().status_code for future in futures} == {200}
    assert sum(isinstance(message, Describe) for message in engine.requests) == 1


def test_every_metric_is_described(tmp_path: Path) -> None:
    with serve(FakeEngine(f"unix:{tmp_path}/e")) as url:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    described = [line.split()[2] for line in lines if line.startswith("# HELP ")]
    typed = [line.split()[2] for line in lines if line.startswith("# TYPE ")]
    assert described == typed
    samples = {re.split("[{ ]", line)[0] for line in lines if not line.startswith("#")}
    endings = re.compile("_(bucket|sum|count)$")
    assert {endings.sub("", s) if s not in typed else s for s in samples} <= set(typed)
