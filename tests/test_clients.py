"""Clients that people use, against the server: streams as LobeChat reads them, npm's, browsers'.

The npm clients run where node and the packages are: in `NANOGPT_TEST_NPM`, a directory with

    npm install openai @ai-sdk/openai-compatible ai
"""

import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.api.settings import ApiSettings
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, generated, hang_up, serve

KEY = "sk-a-key"
TEXT = "Grüße, 世界! 😀"
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
# What LobeChat adds to it: an agent's parameters, and names that a server may not know.
AGENT = {
    "user": "someone",
    "temperature": 0.7,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "enabledSearch": False,
    "thinking": None,
    "reasoning_effort": None,
}


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply(TEXT), template="alpaca")


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine, ApiSettings(api_keys=(KEY,))) as address:
        yield address


# LobeChat


def transform(chunk: dict[str, Any]) -> tuple[str, Any]:
    """Return the event that LobeChat makes of a chunk, and what it carries.

    Written from what its transform does (lobehub/lobe-chat, `streams/openai/openai.ts`): usage is
    taken from a chunk without choices; with a finish reason a chunk's text wins, and the end is
    lost; only the first choice is read. Calls come before text, and their name and id in the first.
    """
    if not chunk["choices"]:
        return ("usage", chunk["usage"]) if chunk.get("usage") else ("data", None)
    item = chunk["choices"][0]
    if item["delta"].get("tool_calls"):
        return "tool_calls", item["delta"]["tool_calls"]
    content = item["delta"].get("content")
    if item["finish_reason"]:
        if isinstance(content, str) and content:
            return "text", content
        return ("usage", chunk["usage"]) if chunk.get("usage") else ("stop", item["finish_reason"])
    return ("text", content) if isinstance(content, str) else ("data", content)


def lobe_chat(url: str, **more: Any) -> list[tuple[str, Any]]:
    """Return the events that LobeChat would see."""
    headers = {"Authorization": f"Bearer {KEY}", "Accept": "*/*"}
    body = {**CHAT, **AGENT, **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    return [transform(json.loads(line.removeprefix("data: "))) for line in lines]


def test_lobe_chat_sees_text_then_the_end_then_the_usage(url: str) -> None:
    events = lobe_chat(url)
    assert [kind for kind, _ in events if kind != "text"] == ["data", "stop", "usage"]
    assert "".join(carried for kind, carried in events if kind == "text") == TEXT
    assert [kind for kind, _ in events][-2:] == ["stop", "usage"]
    usage = events[-1][1]
    assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(usage)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_lobe_chat_sees_a_call_then_the_end_then_the_usage(engine: FakeEngine, url: str) -> None:
    engine.reply = fixed_reply('{"name": "now", "arguments": {}')
    tools = [{"type": "function", "function": {"name": "now", "description": "The time."}}]
    events = lobe_chat(url, tools=tools, tool_choice="required")
    assert [kind for kind, _ in events if kind != "tool_calls"] == ["data", "stop", "usage"]
    calls = [call for kind, calls in events if kind == "tool_calls" for call in calls]
    assert calls[0]["id"]
    assert calls[0]["function"]["name"] == "now"
    assert "".join(call["function"]["arguments"] for call in calls) == "{}"


def test_lobe_chat_s_content_may_be_in_parts(url: str) -> None:
    parts = [{"type": "text", "text": "Hello"}]
    assert lobe_chat(url, messages=[{"role": "user", "content": parts}])[-1][0] == "usage"


def test_lobe_chat_finds_words_for_each_error(engine: FakeEngine, url: str) -> None:
    def code(expected: int, key: str = KEY, **more: Any) -> str:
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **more}, headers=headers)
        assert answer.status_code == expected
        return str(answer.json()["error"]["code"])

    long = [{"role": "user", "content": "x" * 2000}]
    assert code(401, key="wrong") == "invalid_api_key"
    assert code(404, model="gpt-5-mini") == "model_not_found"
    assert code(400, messages=long) == "context_length_exceeded"


def test_lobe_chat_shows_an_error_on_the_way(engine: FakeEngine, url: str) -> None:
    engine.reply, engine.delay_s = fixed_reply("x" * 200), 0.02
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT, headers=headers) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        hang_up(engine)
        *_, error, done = lines
    assert json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"


def transform_event(event: dict[str, Any]) -> tuple[str, Any]:
    """Return what LobeChat makes of an event of the Responses API.

    Written from what its transform does (lobehub/lobe-chat, `streams/openai/responsesStream.ts`):
    text comes in deltas alone, and usage with the event of completion; a call has its name and id
    in the event that adds it, and its arguments in deltas; it passes over others.
    """
    if event["type"] == "response.output_item.added" and event["item"]["type"] == "function_call":
        return "tool_calls", (event["item"]["call_id"], event["item"]["name"])
    if event["type"] == "response.function_call_arguments.delta":
        return "arguments", event["delta"]
    if event["type"] == "response.output_text.delta":
        return "text", event["delta"]
    if event["type"] == "response.completed" and event["response"]["usage"]:
        return "usage", event["response"]["usage"]
    if event["type"] == "response.output_item.done":
        return ("text", None) if event["item"]["id"] else ("data", None)
    return "data", event["response"]["id"] if event["type"] == "response.created" else None


def lobe_chat_responses(url: str, **more: Any) -> list[tuple[str, Any]]:
    """Return the events that LobeChat would see with "Responses API" on."""
    # What it sends with "Responses API" on, beside an agent's parameters.
    body = {
        **CHAT,
        **AGENT,
        "messages": None,
        "stream_options": None,
        "input": [{"role": "user", "content": "Hello"}],
        "max_output_tokens": 100,
        "prompt_cache_key": "key",
        "safety_identifier": "someone",
        "store": False,
        "tool_choice": "auto",
        **more,
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/responses", json=body, headers=headers)
    lines = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    return [transform_event(json.loads(line.removeprefix("data: "))) for line in lines]


def test_lobe_chat_reads_a_call_of_responses(engine: FakeEngine, url: str) -> None:
    engine.reply = fixed_reply('{"name": "now", "arguments": {}')
    tools = [{"type": "function", "name": "now", "description": "The time.", "parameters": {}}]
    events = lobe_chat_responses(url, tools=tools, tool_choice="required")
    ((call_id, name),) = [carried for kind, carried in events if kind == "tool_calls"]
    assert call_id
    assert name == "now"
    assert "".join(carried for kind, carried in events if kind == "arguments") == "{}"
    assert events[-1][0] == "usage"


def test_lobe_chat_reads_responses(url: str) -> None:
    events = lobe_chat_responses(url)
    assert "".join(carried or "" for kind, carried in events if kind == "text") == TEXT
    assert events[0][1].startswith("resp-")
    assert events[-1][0] == "usage"
    assert events[-1][1]["output_tokens"] == N_TOKENS
    assert events[-1][1]["input_tokens_details"]["cached_tokens"] == 0


# npm

SCRIPTS = {
    "openai": """
        import OpenAI from "openai";
        const client = new OpenAI({ baseURL: process.env.URL, apiKey: process.env.KEY });
        const models = await client.models.list();
        const request = { model: models.data[0].id, messages: [{ role: "user", content: "Hi" }] };
        const usage = { include_usage: true };
        const stream = await client.chat.completions.create(
            { ...request, stream: true, stream_options: usage });
        let text = "", finish = null, tokens = null;
        for await (const chunk of stream) {
            text += chunk.choices[0]?.delta?.content ?? "";
            finish = chunk.choices[0]?.finish_reason ?? finish;
            tokens = chunk.usage?.completion_tokens ?? tokens;
        }
        const whole = await client.chat.completions.create(request);
        const wrong = new OpenAI({ baseURL: process.env.URL, apiKey: "no", maxRetries: 0 });
        const refused = await wrong.models.list().catch((e) => [e.constructor.name, e.code]);
        const reply = whole.choices[0].message.content;
        console.log(JSON.stringify({ text, finish, tokens, reply, refused }));
    """,
    "ai-sdk": """
        import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
        import { generateText, streamText } from "ai";
        const settings = { name: "nanogpt", baseURL: process.env.URL, apiKey: process.env.KEY };
        const model = createOpenAICompatible({ ...settings, includeUsage: true })("tiny");
        const result = streamText({ model, prompt: "Hi" });
        let text = "";
        for await (const part of result.textStream) text += part;
        const finish = await result.finishReason;
        const tokens = (await result.usage).outputTokens;
        const reply = (await generateText({ model, prompt: "Hi" })).text;
        const wrong = createOpenAICompatible({ ...settings, apiKey: "no" })("tiny");
        const refused = await generateText({ model: wrong, prompt: "Hi", maxRetries: 0 })
            .catch((e) => [e.name, JSON.parse(e.responseBody).error.code]);
        console.log(JSON.stringify({ text, finish, tokens, reply, refused }));
    """,
}
REFUSED = {"openai": "AuthenticationError", "ai-sdk": "AI_APICallError"}
N_TOKENS = len(TEXT.encode())  # of the byte tokenizer


@pytest.mark.parametrize("name", SCRIPTS)
def test_npm_s_client_streams_answers_and_reads_errors(url: str, name: str) -> None:
    folder = os.environ.get("NANOGPT_TEST_NPM", "")
    node = shutil.which("node")
    if not node or not (Path(folder) / "node_modules" / "openai").is_dir():
        pytest.skip("NANOGPT_TEST_NPM names no directory with the npm clients, or node is missing")
    done = subprocess.run(
        [node, "--input-type=module", "--eval", SCRIPTS[name]],
        env={**os.environ, "URL": f"{url}/v1", "KEY": KEY},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "text": TEXT,
        "finish": "stop",
        "tokens": N_TOKENS,
        "reply": TEXT,
        "refused": [REFUSED[name], "invalid_api_key"],
    }


# Browsers

# What the openai client sends from a page, on each request.
STAINLESS = {
    "x-stainless-arch": "unknown",
    "x-stainless-lang": "js",
    "x-stainless-os": "Unknown",
    "x-stainless-package-version": "7.57.0",
    "x-stainless-retry-count": "0",
    "x-stainless-runtime": "browser:chrome",
    "x-stainless-runtime-version": "1.2.3",
    "x-stainless-timeout": "600",
}
POST = """async ([url, headers, body]) => {
    const answer = await fetch(`${url}/v1/chat/completions`,
        { method: "POST", headers, body: JSON.stringify(body) });
    const text = await answer.text();
    return [answer.status, text, answer.headers.get("x-request-id")];
}"""


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """A page on another origin."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Elsewhere</title>")

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_page_of_another_origin_may_send_requests_with_a_key(
    browser: Any, elsewhere: str, url: str
) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **STAINLESS}
    with browser.new_page() as page:
        page.goto(elsewhere)
        status, text, request_id = page.evaluate(POST, [url, headers, CHAT])
        assert (status, text[-14:]) == (200, "data: [DONE]\n\n")
        assert request_id.startswith("req-")
        refused = {**headers, "Authorization": "Bearer wrong"}
        status, text, _ = page.evaluate(POST, [url, refused, CHAT])
        assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")


def test_a_page_of_another_origin_is_not_shown_the_runs_of_a_server_without_keys(
    browser: Any, elsewhere: str, engine: FakeEngine
) -> None:
    read = "(url) => fetch(url).then((answer) => answer.status)"
    with serve(engine) as url, browser.new_page() as page:
        page.goto(elsewhere)
        assert page.evaluate(read, f"{url}/v1/models") == 200
        assert page.evaluate(read, f"{url}/v1/runs") == 403


def test_a_host_name_that_is_rebound_to_loopback_reaches_nothing(
    browser: Any, engine: FakeEngine
) -> None:
    """A public name that resolves to 127.0.0.1 is of the page's own origin to the browser."""
    with serve(engine) as url, browser.new_page() as page:
        rebound = url.replace("127.0.0.1", "rebound.example")
        assert page.goto(rebound).status == 403
        status, text, _ = page.evaluate(POST, [rebound, {"Content-Type": "application/json"}, CHAT])
        assert (status, json.loads(text)["error"]["code"]) == (403, "host_not_allowed")
        assert generated(engine) == []


def test_a_page_of_another_site_computes_and_reads_nothing(
    browser: Any, elsewhere: str, engine: FakeEngine
) -> None:
    """Neither a request without a preflight, nor a form, an image or a script reaches a route."""
    attack = """async (url) => {
        const blob = new Blob(['{"prompt": "x"}']);
        const options = { method: "POST", mode: "no-cors", body: blob };
        await fetch(`${url}/v1/completions`, options).catch(() => 0);
        const image = Object.assign(document.createElement("img"), { src: `${url}/v1/models` });
        await new Promise((done) => { image.onerror = done; document.body.append(image); });
        return fetch(`${url}/v1/models`).then((answer) => answer.text(), () => "refused");
    }"""
    with serve(engine) as url, browser.new_page() as page:
        statuses: list[int] = []
        page.on("response", lambda answer: statuses.append(answer.status))
        page.goto(elsewhere.replace("127.0.0.1", "rebound.example"))
        statuses.clear()
        assert page.evaluate(attack, url) == "refused"
        assert set(statuses) == {403}
        assert generated(engine) == []


def test_a_page_of_another_origin_cannot_frame_the_page(
    browser: Any, elsewhere: str, engine: FakeEngine
) -> None:
    frame = (
        "(url) => document.body.append(Object.assign(document.createElement('iframe'), {src: url}))"
    )
    with serve(engine) as url, browser.new_page() as page:
        page.goto(elsewhere)
        with page.expect_console_message(lambda message: "frame-ancestors" in message.text):
            page.evaluate(frame, url)
        assert generated(engine) == []
