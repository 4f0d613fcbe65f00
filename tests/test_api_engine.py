"""Front end and engine together, on a small random model: HTTP ships the engine's results."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from nanogpt.checkpoint import load_checkpoint
from nanogpt.generation import generate
from nanogpt.tokenizer import byte_tokenizer
from tests.engine_models import write_model
from tests.front_end import eventually
from tests.test_serve import ROOT, answers, free_port

PROMPT = [104, 101, 108, 108, 111]
LINUX = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc of Linux")


class Gadget:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


# What runs in readers that trust a checkpoint: pickle, and Lightning before 2.6.6.
MALICIOUS: dict[str, dict[str, Any]] = {
    "gadget": {"nanogpt": Gadget(), "state_dict": {}},
    "instantiator": {
        "hyper_parameters": {"command": "touch pwned"},
        "hparams_name": "kwargs",
        "_instantiator": "os.system",
        "state_dict": {},
    },
    "class-path": {
        "hyper_parameters": {"_class_path": "os.system", "command": "touch pwned"},
        "state_dict": {},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_model(path / "one" / "checkpoints" / "last.ckpt")
    for name, content in MALICIOUS.items():
        (path / name / "checkpoints").mkdir(parents=True)
        torch.save(content, path / name / "checkpoints" / "last.ckpt")
    return path


@pytest.fixture(scope="module")
def url(runs: Path) -> Iterator[str]:
    """A server started as a user would."""
    port = free_port()
    settings = ("dtype=fp32", "threads=1", "cache_gb=0.1", "drain_s=10", "default_model=one")
    command = [sys.executable, str(ROOT / "serve.py"), f"runs_dir={runs}", f"port={port}"]
    server = subprocess.Popen([*command, *settings], env=os.environ, cwd=runs)
    try:
        address = f"http://127.0.0.1:{port}"
        assert eventually(lambda: answers(f"{address}/ready"), 120)
        yield address
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_likeliest_tokens_are_those_of_generate(runs: Path, client: openai.OpenAI) -> None:
    checkpoint = load_checkpoint(runs / "one")
    expected = list(generate(checkpoint.model, PROMPT, max_new_tokens=20, temperature=0))
    answer = client.completions.create(
        model="one", prompt=PROMPT, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == checkpoint.tokenizer.decode(expected)


def test_streamed_whole_and_second_answers_are_equal(client: openai.OpenAI) -> None:
    body = {"model": "one", "prompt": "hello", "max_tokens": 60, "seed": 3, "logprobs": 2}
    first = client.completions.create(**body).choices[0]  # type: ignore[call-overload]
    again = client.completions.create(**body).choices[0]  # type: ignore[call-overload]
    stream = client.completions.create(**body, stream=True)  # type: ignore[call-overload]
    chunks = [chunk.choices[0] for chunk in stream]
    assert again == first
    assert "".join(chunk.text for chunk in chunks) == first.text
    logprobs = [x for c in chunks if c.logprobs for x in c.logprobs.token_logprobs]
    assert logprobs == first.logprobs.token_logprobs


def test_the_usage_of_a_second_turn_counts_its_cached_tokens(client: openai.OpenAI) -> None:
    text = "To be, or not to be, that is the question. " * 2
    client.completions.create(model="one", prompt=text, max_tokens=1)
    again = client.completions.create(model="one", prompt=text + "Whether", max_tokens=1)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 0


def test_an_echoed_prompt_is_scored_as_it_was_generated(client: openai.OpenAI) -> None:
    body = {"model": "one", "temperature": 0, "logprobs": 0}
    made = client.completions.create(prompt=PROMPT, max_tokens=8, **body)  # type: ignore[call-overload]
    logprobs = made.choices[0].logprobs
    ids = [*PROMPT, *map(byte_of, logprobs.tokens)]
    scored = client.completions.create(prompt=ids, max_tokens=0, echo=True, **body)  # type: ignore[call-overload]
    n = len(logprobs.token_logprobs)
    assert scored.choices[0].logprobs.token_logprobs[-n:] == pytest.approx(
        logprobs.token_logprobs, abs=1e-4
    )


@pytest.mark.parametrize("model", MALICIOUS)
def test_a_malicious_checkpoint_is_refused_and_runs_nothing(
    url: str, runs: Path, model: str
) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={"model": model, "prompt": "x"}, timeout=60)
    assert answer.status_code >= 400
    assert answer.json()["error"]["message"]
    assert not (runs / "pwned").exists()
    body = {"model": "one", "prompt": "x", "max_tokens": 1}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


@LINUX
def test_an_engine_that_is_killed_is_started_again(client: openai.OpenAI) -> None:
    body = {"model": "one", "prompt": PROMPT, "temperature": 0}
    # 64 answers of 240 tokens: the engine is still at work when it is killed
    many = {**body, "prompt": [PROMPT] * 8, "n": 8, "max_tokens": 240, "stream": True}
    before = client.completions.create(**body, max_tokens=5).choices[0].text  # type: ignore[call-overload]
    engine = engine_of(str(client.base_url))
    with client.completions.create(**many, extra_body={"ignore_eos": True}) as stream:  # type: ignore[call-overload]
        next(stream)
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="engine stopped"):
            list(stream)
    patient = client.with_options(max_retries=20)  # 503 with Retry-After, until it is there
    after = patient.completions.create(**body, max_tokens=5).choices[0].text  # type: ignore[call-overload]
    assert after == before


def engine_of(url: str) -> int:
    """Return the process id of the engine that the server at a port started."""
    port = httpx.URL(url).port
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().split(b"\0")
            environment = (directory / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another's
            continue
        if b"serving.engine" in command and f"NANOGPT_PORT={port}".encode() in environment:
            return int(directory.name)
    raise AssertionError(f"no engine of the server at port {port}")


def byte_of(token: str) -> int:
    """Return the id of a token of the byte tokenizer from its name."""
    return int(token.removeprefix("bytes:\\x"), 16) if token.startswith("bytes:") else ord(token)


def test_a_prompt_has_the_same_tokens_by_every_route(client: openai.OpenAI, url: str) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = httpx.post(f"{url}/tokenize", json={"model": "one", "messages": messages}).json()
    shared: dict[str, Any] = {"model": "one", "temperature": 0.8, "top_p": 0.95}
    more: Any = {"extra_body": {"seed": 7, "ignore_eos": True}}
    chat: Any = client.chat.completions.create(
        messages=messages, max_tokens=24, logprobs=True, top_logprobs=0, **shared, **more
    )
    text: Any = client.completions.create(
        prompt=rendered["tokens"], max_tokens=24, logprobs=0, **shared, **more
    )
    response: Any = client.responses.create(
        input="Hi",
        instructions="Be brief.",
        max_output_tokens=24,
        include=["message.output_text.logprobs"],
        **shared,
        **more,
    )
    by_chat = [(one.bytes, one.logprob) for one in chat.choices[0].logprobs.content]
    (part,) = response.output[0].content
    assert [(one.bytes, one.logprob) for one in part.logprobs] == by_chat
    assert text.choices[0].logprobs.token_logprobs == [logprob for _, logprob in by_chat]
    assert response.output_text == chat.choices[0].message.content == text.choices[0].text
    assert len(by_chat) == 24
    assert response.usage.input_tokens == chat.usage.prompt_tokens == rendered["count"]


def test_an_embedding_is_the_model_s_in_any_company(client: openai.OpenAI, runs: Path) -> None:
    texts = ["hello", "It was a bright cold day in April. " * 5, "x"]
    together = client.embeddings.create(model="one", input=texts)
    alone = client.embeddings.create(model="one", input=texts[1])
    assert alone.data[0].embedding == together.data[1].embedding
    ids = torch.tensor([list(texts[1].encode())])
    with torch.no_grad():
        mean = load_checkpoint(runs / "one").model.hidden_states(ids)[0].mean(0)
    expected = (mean / mean.norm()).tolist()
    assert alone.data[0].embedding == pytest.approx(expected, abs=1e-5)


def test_options_are_weighed_by_the_model_s_log_likelihoods(url: str, runs: Path) -> None:
    state = "It was a bright cold day in April, and the clocks were striking thirteen. " * 2
    options = [" Winston", " w", "\n", "The"]
    question = {"type": "choice", "criteria": dict.fromkeys(options)}
    body = {"model": "one", "state": state, "questions": {"next": question}}
    found = httpx.post(f"{url}/v1/systemone", json=body, timeout=60).json()["answers"]["next"]
    model, expected = load_checkpoint(runs / "one").model, {}
    for option in options:
        ids = torch.tensor([list((state + option).encode())])
        with torch.no_grad():
            logprobs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        expected[option] = float(logprobs[-len(option.encode()) :].sum())
    assert found["logprobs"] == pytest.approx(expected, abs=1e-3)
    weights = torch.tensor(list(expected.values())).softmax(0).tolist()
    assert list(found["probabilities"].values()) == pytest.approx(weights, abs=1e-3)


def test_an_option_has_the_likelihood_that_it_has_as_an_echo(url: str) -> None:
    state, options = "x" * 90, [" one", " two", " three"]
    scored = {}
    for option in options:
        body = {"prompt": state + option, "max_tokens": 0, "echo": True, "logprobs": 0}
        choice = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
        scored[option] = math.fsum(choice["logprobs"]["token_logprobs"][len(state) :])
    question = {"type": "choice", "criteria": dict.fromkeys(options)}
    body = {"state": state, "questions": {"next": question}}
    found = httpx.post(f"{url}/v1/systemone", json=body, timeout=60).json()["answers"]["next"]
    assert found["logprobs"] == scored


def test_an_id_that_a_client_keeps_stays_valid_across_reloads(
    runs: Path, client: openai.OpenAI
) -> None:
    path = runs / "renewed" / "checkpoints" / "last.ckpt"

    def greedy(seed: int) -> str:
        model = write_model(path, seed=seed)
        return byte_tokenizer().decode(
            list(generate(model, PROMPT, max_new_tokens=8, temperature=0))
        )

    expected = greedy(seed=5)
    assert eventually(lambda: "renewed" in {model.id for model in client.models.list()}, 30)
    kept = next(model.id for model in client.models.list() if model.id.startswith("renewed"))

    def text() -> str:
        body: dict[str, Any] = {"model": kept, "prompt": PROMPT, "max_tokens": 8}
        more: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
        return client.completions.create(**body, **more).choices[0].text

    assert text() == expected
    expected = greedy(seed=6)
    assert eventually(lambda: text() == expected, 30)
    assert kept in {model.id for model in client.models.list()}


def test_many_at_once_have_the_answers_they_have_alone(url: str) -> None:
    bodies = [
        {"prompt": f"text {i % 7}", "seed": i, "max_tokens": 10 + i, "temperature": i % 2}
        for i in range(16)
    ]

    async def post_all() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as asynchronous:
            answers = [asynchronous.post("/v1/completions", json=body) for body in bodies]
            return [a.json()["choices"][0]["text"] for a in await asyncio.gather(*answers)]

    alone = [
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        for body in bodies
    ]
    assert asyncio.run(post_all()) == alone


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=120)
    pets: list[Literal["cat", "dog"]] = Field(max_length=2)


HELLO: Any = [{"role": "user", "content": "Who is it?"}]


def test_the_openai_client_parses_an_answer_of_a_pydantic_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="one", messages=HELLO, response_format=Person, seed=1, n=3, max_tokens=100
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Person)
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_a_streamed_answer_of_a_schema_is_the_whole_one(client: openai.OpenAI) -> None:
    options: Any = {"model": "one", "messages": HELLO, "seed": 2, "max_tokens": 100}
    whole = client.chat.completions.parse(**options, response_format=Person).choices[0]
    with client.chat.completions.stream(**options, response_format=Person) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.content == whole.message.content
    assert streamed.message.parsed == whole.message.parsed
    assert streamed.finish_reason == "stop"


def test_json_that_max_tokens_cuts_has_the_reason_length(client: openai.OpenAI) -> None:
    options: Any = {"model": "one", "messages": HELLO, "response_format": Person}
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**options, max_tokens=5)


def test_a_stop_string_ends_json_where_it_occurs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="one", prompt="x", stop="name", extra_body={"guided_json": Person.model_json_schema()}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ('{"', "stop")


class Move(BaseModel):
    to: Literal["left", "right"]
    steps: int = Field(ge=1, le=9)


CALLS: Any = {
    "model": "one",
    "messages": HELLO,
    "tools": [openai.pydantic_function_tool(Person), openai.pydantic_function_tool(Move)],
    "tool_choice": "required",
    "max_tokens": 150,
}


@pytest.mark.parametrize("name", [None, "Person", "Move"])
def test_forced_calls_have_valid_arguments_whatever_the_weights(
    client: openai.OpenAI, name: str | None
) -> None:
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in CALLS["tools"]}
    choice = {"type": "function", "function": {"name": name}} if name else "required"
    answer: Any = client.chat.completions.create(**{**CALLS, "tool_choice": choice}, seed=1, n=8)
    reason = "stop" if name else "tool_calls"
    assert [choice.finish_reason for choice in answer.choices] == [reason] * 8
    functions = [choice.message.tool_calls[0].function for choice in answer.choices]
    for function in functions:
        jsonschema.validate(json.loads(function.arguments), schemas[function.name])
        assert name in (None, function.name)


def test_a_streamed_call_is_the_whole_one_and_the_client_parses_it(client: openai.OpenAI) -> None:
    whole: Any = client.chat.completions.parse(**CALLS, seed=3).choices[0]
    with client.chat.completions.stream(**CALLS, seed=3) as stream:
        streamed: Any = stream.get_final_completion().choices[0]
    (call,), (other,) = whole.message.tool_calls, streamed.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person | Move)
    assert other.function.parsed_arguments == call.function.parsed_arguments
    assert other.function.arguments == call.function.arguments
