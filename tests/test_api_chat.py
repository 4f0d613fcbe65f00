"""Chat completions through the OpenAI client."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nanogpt import prompts
from nanogpt.prompts import find_template
from nanogpt.tokenizer import byte_tokenizer
from serving.engine.messages import Generate, Message
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, generated, serve

TEXT = "Grüße, 🌍! END and more"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path_factory.mktemp('engine')}/e", reply=fixed_reply(TEXT))


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, **options: object) -> openai.types.chat.ChatCompletion:
    body: dict[str, object] = {"model": "tiny", "messages": HELLO, **options}
    return client.chat.completions.create(**body)  # type: ignore[call-overload]


def test_an_answer_has_text_reason_and_usage(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(TEXT.encode())


def test_the_prompt_is_the_template_s_own_ids(client: openai.OpenAI, engine: FakeEngine) -> None:
    complete(client, messages=[{"role": "system", "content": "Be brief."}, *HELLO])
    messages = [prompts.Message("system", "Be brief."), prompts.Message("user", "Hello")]
    plain, _ = find_template("plain").encode(byte_tokenizer(), messages, add_generation_prompt=True)
    assert generated(engine)[-1].prompt_ids == plain


def test_a_content_that_spells_a_special_token_stays_text(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    complete(client, messages=[{"role": "user", "content": "<|endoftext|>"}])
    assert generated(engine)[-1].prompt_ids.count(byte_tokenizer().eot_id) == 1  # the opening


def test_content_may_come_in_parts(client: openai.OpenAI, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    complete(client, messages=[{"role": "user", "content": parts}])
    in_parts = generated(engine)[-1].prompt_ids
    complete(client, messages=[{"role": "user", "content": "first\nsecond"}])
    assert generated(engine)[-1].prompt_ids == in_parts


def test_system_messages_are_one_at_the_start(client: openai.OpenAI, engine: FakeEngine) -> None:
    complete(client, messages=[*HELLO, {"role": "developer", "content": "Be brief."}])
    text = byte_tokenizer().decode(generated(engine)[-1].prompt_ids)
    assert text == "Be brief.\n\nUser:\nHello\n\nAssistant:\n"


def test_a_picture_is_refused(client: openai.OpenAI) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match="reads text only"):
        complete(client, messages=[{"role": "user", "content": parts}])


def test_a_stop_string_ends_the_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = complete(client, stop=["END"])
    assert answer.choices[0].message.content == "Grüße, 🌍! "
    assert answer.choices[0].finish_reason == "stop"


def test_a_full_answer_ends_with_length(client: openai.OpenAI) -> None:
    answer = complete(client, max_completion_tokens=2)
    assert answer.choices[0].message.content == "Gr"
    assert answer.choices[0].finish_reason == "length"


def test_the_answer_gets_the_context_that_is_left(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    complete(client)
    request = generated(engine)[-1]
    assert request.params.max_tokens == 1024 - len(request.prompt_ids)


def test_sampling_parameters_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [65]}
    complete(
        client,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"66": -100},
        extra_body=extra,
    )
    params = generated(engine)[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert (params.repetition_penalty, params.logit_bias) == (1.1, {66: -100})
    assert params.seed == 2**64 - 1
    assert params.stop_ids == (byte_tokenizer().eot_id, 65)


def test_several_answers_differ_in_their_seeds_and_the_first_has_the_given_one(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    answer = complete(client, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    seeds = [request.params.seed for request in generated(engine)[-3:]]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


def test_nulls_and_unknown_fields_are_passed_over(client: openai.OpenAI) -> None:
    names = ("temperature", "top_p", "max_tokens", "stop", "seed", "n", "stream", "logit_bias")
    body = {**dict.fromkeys(names), "reasoning_effort": "high", "user": "me", "tools": None}
    assert complete(client, extra_body=body).choices[0].message.content == TEXT


def test_logprobs_come_with_bytes(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=True, top_logprobs=2, stop="rüß").choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    (token,) = choice.logprobs.content  # the tokens of the stop string are left out
    assert (token.token, token.bytes, token.logprob) == ("G", [71], -1.0)
    assert len(token.top_logprobs) == 2


def test_a_prompt_that_fills_the_context_is_refused_with_the_code_that_clients_know(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, messages=[{"role": "user", "content": "x" * 2000}], stream=True)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"


def test_a_model_is_found_by_alias_and_by_default(client: openai.OpenAI) -> None:
    assert [complete(client, model=name).model for name in ("run/tiny", "tiny.ckpt", "")] == [
        "tiny"
    ] * 3


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed.id == "tiny"
    assert client.models.retrieve("tiny.ckpt").id == "tiny"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        complete(client, model="../../etc/passwd")
    assert refused.value.code == "model_not_found"
    assert "passwd' does not exist; there are tiny" in refused.value.message


def test_a_chat_model_stops_at_its_turn_markers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer().with_special_tokens(find_template("chat").special_tokens)
    engine = FakeEngine(f"unix:{tmp_path}/e", tokenizer=tokenizer, template="chat")
    with serve(engine) as url, openai.OpenAI(base_url=url, api_key="none") as client:
        complete(client, max_tokens=1)  # without /v1 in the base URL
    expected = [tokenizer.special_tokens[f"<|{n}|>"] for n in ("system", "user", "assistant")]
    assert generated(engine)[-1].params.stop_ids == (tokenizer.eot_id, *expected)


def test_a_tokenizer_without_the_markers_of_the_template_is_an_error(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", tokenizer=byte_tokenizer(), template="chat")
    with (
        serve(engine) as url,
        openai.OpenAI(base_url=url, api_key="none") as client,
        pytest.raises(openai.BadRequestError, match=r"has no <\|user\|>"),
    ):
        complete(client)


@pytest.mark.parametrize("name", prompts.TEMPLATES)
def test_the_served_prompt_is_what_was_trained_on_up_to_the_reply(
    tmp_path: Path, name: str
) -> None:
    template = find_template(name)
    tokenizer = byte_tokenizer().with_special_tokens(template.special_tokens)
    question, reply = ("user", " What is <|user|>?\n"), ("assistant", "A word.")
    ids, is_response = template.encode(
        tokenizer, [prompts.Message(*question), prompts.Message(*reply)]
    )
    n = is_response.index(True)
    with serve(FakeEngine(f"unix:{tmp_path}/e", tokenizer=tokenizer, template=name)) as url:
        body = {"messages": [{"role": question[0], "content": question[1]}]}
        served = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
    assert served == ids[:n]


@pytest.mark.anyio
async def test_the_asynchronous_client_streams(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == TEXT


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_the_client_s_stream_helper_ends_with_the_whole_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "Hello"}]
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_the_raw_response_names_the_request(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        extra_headers={"X-Request-ID": "mine-1"},
    )
    assert raw.headers["x-request-id"] == "mine-1"


def test_a_trailing_slash_lists_the_models_too(url: str) -> None:
    assert httpx.get(f"{url}/v1/models/").json() == httpx.get(f"{url}/v1/models").json()


def test_the_client_comes_again_when_the_server_was_busy(tmp_path: Path) -> None:
    engine = BusyOnce(f"unix:{tmp_path}/e", reply=fixed_reply("now"))
    with serve(engine) as url, openai.OpenAI(base_url=url, api_key="none") as client:
        assert complete(client).choices[0].message.content == "now"


class BusyOnce(FakeEngine):
    """An engine whose queue is full for the first request."""

    def _receive(self, message: Message, writer: asyncio.StreamWriter) -> None:
        is_first = isinstance(message, Generate) and not generated(self)
        self.failure = ("overloaded", "The queue is full.") if is_first else None
        super()._receive(message, writer)


def test_the_final_message_is_continued(client: openai.OpenAI, engine: FakeEngine) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Once "}]
    body = {"add_generation_prompt": False, "continue_final_message": True}
    complete(client, messages=begun, extra_body=body)
    text = byte_tokenizer().decode(generated(engine)[-1].prompt_ids)
    assert text == "User:\nHello\n\nAssistant:\nOnce "


def test_an_answer_may_be_begun_without_a_question(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    begun = [{"role": "assistant", "content": "Once"}]
    complete(client, messages=begun, extra_body={"continue_final_message": True})
    assert byte_tokenizer().decode(generated(engine)[-1].prompt_ids) == "Assistant:\nOnce"


@pytest.mark.parametrize(
    ("messages", "body", "param"),
    [
        (HELLO, {"continue_final_message": True}, "messages"),
        (
            [{"role": "assistant", "content": "x"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(
    client: openai.OpenAI, messages: Any, body: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, messages=messages, extra_body=body)
    assert refused.value.param == param


def test_the_assistant_s_turn_may_be_left_closed(client: openai.OpenAI, engine: FakeEngine) -> None:
    complete(client, extra_body={"add_generation_prompt": False})
    assert byte_tokenizer().decode(generated(engine)[-1].prompt_ids) == "User:\nHello\n\n"


def test_tokenize_gives_the_ids_that_are_continued(url: str, engine: FakeEngine) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Once "}]
    for flags in ({"continue_final_message": True}, {"add_generation_prompt": False}, {}):
        body = {"messages": begun, **flags}
        answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 1})
        counted = httpx.post(f"{url}/tokenize", json=body).json()
        assert counted["tokens"] == generated(engine)[-1].prompt_ids
        assert counted["count"] == answer.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_of_minus_one_fills_the_context(
    client: openai.OpenAI, engine: FakeEngine, name: str
) -> None:
    complete(client, **{name: -1})
    request = generated(engine)[-1]
    assert request.params.max_tokens == 1024 - len(request.prompt_ids)


@pytest.mark.parametrize(
    "messages", [HELLO * 300, [{"role": "user", "content": "x" * 12_000}]], ids=["many", "long"]
)
def test_a_large_conversation_is_encoded_in_a_thread(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, messages: Any
) -> None:
    threads: list[str] = []
    render = prompts.Template.render

    def recorded(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return render(*arguments)

    monkeypatch.setattr(prompts.Template, "render", recorded)
    httpx.post(f"{client.base_url}tokenize", json={"messages": HELLO})
    httpx.post(f"{client.base_url}tokenize", json={"messages": messages})
    assert [name.startswith("asyncio_") for name in threads] == [False, True]
