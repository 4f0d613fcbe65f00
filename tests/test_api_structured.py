"""Requests for JSON and other formats: which grammar the engine gets, and what is refused."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer

from serving.api.structured import check_schema
from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, generated, serve

PATHS = ["/v1/chat/completions", "/v1/completions"]
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    return FakeEngine(f"unix:{tmp_path_factory.mktemp('engine')}/e", reply=fixed_reply("{}"))


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serve(engine) as address:
        yield address


def post(url: str, path: str = PATHS[0], **fields: Any) -> httpx.Response:
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], **fields}
    headers = {"Content-Type": "application/json"}
    return httpx.post(url + path, content=json.dumps(body), headers=headers, timeout=60)


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def follows(grammar: str, text: str) -> bool:
    """Return whether a text is one of a grammar."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = [*text.encode()]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "texts", "others"),
    [
        (
            {"response_format": {"type": "json_object"}},
            ["{}", '{"a": [1,2], "é":{"b":null}}'],
            ["[]", "1", '{"a":\n1}', '{"\\u0061":1}', "{} "],
        ),
        (
            {"response_format": json_schema({"type": "array", "items": {"enum": ["x"]}})},
            ["[]", '["x"]'],
            ['["y"]', "{}"],
        ),
        ({"response_format": json_schema({})}, ["1", "{}"], ["x"]),
        ({"guided_json": '{"type": "null"}'}, ["null"], ["1"]),
        ({"guided_json": {"type": "null"}}, ["null"], ["1"]),
        ({"guided_regex": "a{2,3}|é"}, ["aa", "aaa", "é"], ["a", "aaé"]),
        ({"guided_choice": ['a"b', "c\\d\n"]}, ['a"b', "c\\d\n"], ["a"]),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ["yes", "no"], ["maybe"]),
        ({"structured_outputs": {"json": {"type": "null"}, "regex": None}}, ["null"], ["1"]),
    ],
)
def test_the_engine_gets_the_grammar_of_a_format(
    engine: FakeEngine, url: str, path: str, fields: Any, texts: list[str], others: list[str]
) -> None:
    assert post(url, path, **fields).status_code == 200
    grammar = generated(engine)[-1].params.grammar
    assert [follows(grammar, text) for text in texts] == [True] * len(texts)
    assert [follows(grammar, text) for text in others] == [False] * len(others)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_any_text_needs_no_grammar(engine: FakeEngine, url: str, fields: dict[str, Any]) -> None:
    assert post(url, **fields).status_code == 200
    assert generated(engine)[-1].params.grammar == ""


def test_llguidances_own_options_have_no_effect(engine: FakeEngine, url: str) -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": True}}
    assert post(url, response_format=json_schema(schema)).status_code == 200
    assert not follows(generated(engine)[-1].params.grammar, '{  "a":1}')


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "null"}}, "not"),
        ({"type": "object", "properties": {"a": {"propertyNames": {}}}}, "propertyNames"),
        ({"type": "strin"}, "strin"),
        ({"type": "object", "properties": [1]}, "properties must be an object"),
        ({"type": [{}]}, "type"),
        ({"type": "string", "format": "phone"}, "phone"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": ["\ud800"]}, "JSON"),
        ({"$ref": "#/$defs/a"}, "$defs"),
        ({"$ref": "https://example.org/s"}, "https://example.org/s"),
        (ENDLESS, "has an end"),
        ({"$ref": "#"}, "has an end"),
        (
            {"properties": {"a": {"$ref": "#/$defs/e"}}, "$defs": {"e": {"$ref": "#/$defs/e"}}},
            "has an end",
        ),
        ({"minProperties": 2, "additionalProperties": {"type": "null"}}, "minProperties"),
        ({"enum": ["x" * 70_000]}, "characters"),
        ({"const": "a\x00b"}, "'a\\x00b'"),
        ({"properties": {"\x7f": {"type": "null"}}, "required": ["\x7f"]}, "'\\x7f'"),
        ({"type": "string", "pattern": r"^a\x01b$"}, r"'^a\\x01b$'"),
        ({"allOf": [{"pattern": f"^.*{'ab' * i}.*$"} for i in range(1, 30)]}, "compile"),
        (
            {"type": "object", "properties": {f"k{i}": {"type": "null"} for i in range(1500)}},
            "items",
        ),
    ],
)
def test_a_schema_that_cannot_be_followed_exactly_is_refused(
    url: str, schema: dict[str, Any], message: str
) -> None:
    answer = post(url, response_format=json_schema(schema))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "response_format"
    assert message in error["message"]


def test_a_schema_that_would_overflow_a_stack_is_refused(url: str) -> None:
    steps = {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(450)}
    nested: Any = {"type": "null"}
    for _ in range(400):
        nested = {"items": nested}
    for schema in ({"$ref": "#/$defs/0", "$defs": {**steps, "450": nested}}, nested):
        assert post(url, response_format=json_schema(schema)).status_code == 400
    assert post(url, response_format={"type": "json_object"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format",
        ),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": json_schema([])}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "1"}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"grammar": "root ::= 'a'"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
    ],
)
def test_a_format_that_is_incomplete_or_doubled_is_refused(
    url: str, fields: dict[str, Any], param: str
) -> None:
    answer = post(url, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 1},
        {"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1},
        {"$defs": {"a/b": {"$ref": "#/$defs/c"}, "c": {"const": {}}}, "$ref": "#/$defs/a~1b"},
    ],
)
def test_recursion_that_can_end_is_allowed(schema: dict[str, Any]) -> None:
    check_schema(schema)
