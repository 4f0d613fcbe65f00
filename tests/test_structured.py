"""Answers that follow a grammar: the engine's masks, whatever the weights."""

import json
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from nanogpt.tokenizer import byte_tokenizer
from serving.api.structured import OPTIONS
from serving.engine.grammar import compile_grammar
from serving.engine.messages import Cancel, Failed, Generate, Tokens
from tests.engine_models import MODERN, Answer, InlineEngine, generate, write_model

EOT = byte_tokenizer().eot_id
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["left"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SHORT = {"type": "string", "maxLength": 4}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    TREE,
    {"type": "integer", "minimum": -3, "maximum": 700},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"const": {"a": [1, "é\n", None]}},
    {"enum": ["red", "green", 3, None, [True]]},
    SHORT,
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    {"type": "string", "pattern": "^(ab|cd){1,3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [SHORT, {"type": "null"}], "items": False, "minItems": 2},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "properties": {"a": SHORT, "b": SHORT}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 2},
    {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1},
    {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "null"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {"anyOf": [{"type": "boolean"}, {"type": "object", "required": ["k"]}], "maxProperties": 1},
    {"oneOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "null"}]},
    {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 77}]},
    {
        "type": "object",
        "allOf": [
            {"properties": {"a": {"type": "null"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "properties": {"a": True, "b": True},
        "additionalProperties": False,
    },
    {"type": "object", "properties": {'é "q"': {"type": "null"}}, "required": ['é "q"']},
]


def of_schema(schema: dict[str, Any]) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS))


def text_of(answer: Answer) -> str:
    return byte_tokenizer().decode(answer.ids)


def ended(answer: Answer) -> str | None:
    assert isinstance(answer.end, Tokens), answer.end
    return answer.end.finish_reason


def constrained(name: str, schema: dict[str, Any], **params: Any) -> Generate:
    params = {"max_tokens": 200, "temperature": 1.0, "stop_ids": (EOT,), **params}
    return generate(name, [65], grammar=of_schema(schema), **params)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt"
    write_model(path)
    return path


@pytest.mark.parametrize(("keys", "dtype"), [({}, "fp32"), (MODERN, "bf16")])
def test_every_finished_answer_is_valid(tmp_path: Path, keys: Any, dtype: str) -> None:
    path = tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt"
    write_model(path, **keys)
    requests, schemas = [], {}
    for i, schema in enumerate(SCHEMAS):
        for seed in range(3):
            schemas[f"{i}-{seed}"] = schema
            filters: Any = ({}, {"top_k": 5}, {"temperature": 0.5, "top_p": 0.8})[seed]
            requests.append(constrained(f"{i}-{seed}", schema, seed=seed, **filters))
    answers = InlineEngine(path, dtype=dtype, max_slots=8).all(requests)
    finished = {name for name, answer in answers.items() if ended(answer) == "stop"}
    for name in finished:
        jsonschema.validate(
            json.loads(text_of(answers[name])),
            schemas[name],
            format_checker=jsonschema.FormatChecker(),
        )
    assert len(finished) > 0.9 * len(answers)


def test_neighbours_keep_their_answers_to_the_bit(checkpoint: Path) -> None:
    own: list[dict[str, Any]] = [
        *({}, {"top_k": 4}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.9, "top_p": 0.9})
    ]
    free = [
        generate(f"free{i}", [70 + i] * (i + 3), max_tokens=20, logprobs=3, **params)
        for i, params in enumerate(own)
    ]
    bound = [constrained(f"bound{i}", PERSON, seed=i, logprobs=3) for i in range(4)]
    alone = {r.request_id: InlineEngine(checkpoint).one(r).outcome for r in [*free, *bound]}
    together = InlineEngine(checkpoint, max_slots=8).all([*free, *bound])
    crowded = InlineEngine(checkpoint, max_slots=3).all([*bound, *free])
    assert {name: answer.outcome for name, answer in together.items()} == alone
    assert {name: crowded[name].outcome for name in alone} == alone


def test_log_probabilities_stay_the_models_own(checkpoint: Path) -> None:
    free = InlineEngine(checkpoint).one(generate("f", [65], max_tokens=1, logprobs=5))
    bound = InlineEngine(checkpoint).one(
        constrained("b", {"type": "boolean"}, temperature=0.0, logprobs=5)
    )
    assert bound.top[0] == free.top[0]
    assert bound.logprobs[0] != free.logprobs[0]


def test_an_answer_ends_where_only_the_end_can_follow(checkpoint: Path) -> None:
    exactly = {"const": "ab"}
    answer = InlineEngine(checkpoint).one(constrained("a", exactly, max_tokens=4))
    assert (text_of(answer), ended(answer)) == ('"ab"', "stop")
    answer = InlineEngine(checkpoint).one(constrained("b", exactly, max_tokens=3))
    assert (text_of(answer), ended(answer)) == ('"ab', "length")


@pytest.mark.parametrize("ending", [{"ignore_eos": True}, {"stop_ids": ()}])
def test_a_text_that_may_go_on_does_where_no_token_may_end_it(
    checkpoint: Path, ending: dict[str, Any]
) -> None:
    request = constrained("a", {"type": "integer", "minimum": 1}, max_tokens=9, **ending)
    answer = InlineEngine(checkpoint).one(request)
    assert text_of(answer).isdigit()
    assert (len(answer.ids), ended(answer)) == (9, "length")


def test_an_end_token_comes_only_after_a_whole_text(checkpoint: Path) -> None:
    bias = {EOT: 100.0}
    answer = InlineEngine(checkpoint).one(
        constrained("a", {"type": "integer", "minimum": 10}, logit_bias=bias)
    )
    assert ended(answer) == "stop"
    assert len(text_of(answer)) == 2


def test_an_ordinary_stop_token_ends_an_answer_as_a_stop_string_does(checkpoint: Path) -> None:
    request = constrained("a", {"const": "abc"}, stop_ids=(EOT, ord("b")))
    answer = InlineEngine(checkpoint).one(request)
    assert (text_of(answer), ended(answer)) == ('"a', "stop")


def test_bias_and_penalties_choose_among_what_is_allowed(checkpoint: Path) -> None:
    choice = {"enum": ["x", "y", "z"]}
    for letter in "xyz":
        bias = {ord(letter): 100.0, ord("q"): 100.0}
        answer = InlineEngine(checkpoint).one(
            constrained("a", choice, logit_bias=bias, presence_penalty=1.0)
        )
        assert text_of(answer) == f'"{letter}"'


def test_a_grammar_is_compiled_once_and_in_another_thread(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_(grammar: str, vocabulary: LLTokenizer) -> LLMatcher:
        compiled.append(threading.current_thread())
        return compile_grammar(grammar, vocabulary)

    monkeypatch.setattr("serving.engine.grammar.compile_grammar", compile_)
    inline = InlineEngine(checkpoint)
    inline.all([constrained("a", PERSON), constrained("b", PERSON, seed=1)])
    inline.one(constrained("c", PERSON))
    assert len(compiled) == 1
    assert compiled[0] is not threading.current_thread()


def test_a_grammar_that_fails_is_a_refusal_for_its_request_alone(checkpoint: Path) -> None:
    bad = generate("bad", [65], grammar="start: /(/")
    answers = InlineEngine(checkpoint).all([bad, generate("good", [65])])
    failed = answers["bad"].end
    assert isinstance(failed, Failed)
    assert failed.kind == "invalid"
    assert ended(answers["good"]) == "length"


def test_a_grammar_that_grows_too_large_refuses_its_request_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = LLParserLimits(max_lexer_states=500, verbose_errors=False)
    monkeypatch.setattr("serving.engine.grammar.LIMITS", limits)
    grammar = str(LLMatcher.grammar_from_regex("(.*[a-m].{60}){2}"))
    growing = generate("growing", [65], grammar=grammar, max_tokens=250, temperature=1.0, seed=1)
    answers = InlineEngine(checkpoint).all([growing, generate("free", [65], max_tokens=250)])
    failed = answers["growing"].end
    assert isinstance(failed, Failed)
    assert failed.kind == "invalid"
    assert failed.message.startswith("The grammar became too large for this answer (lexer error: ")
    assert len(answers["growing"].ids) > 1
    assert ended(answers["free"]) == "length"
    assert not [one for one in caplog.records if one.exc_info]


def test_a_request_that_is_cancelled_while_its_grammar_compiles_is_gone(checkpoint: Path) -> None:
    inline = InlineEngine(checkpoint)
    inline.one(generate("first", [65]))
    inline.engine.accept(inline, constrained("a", PERSON))
    inline.engine.accept(inline, Cancel("a"))
    inline.settle()
    assert "a" not in inline.answers
    assert inline.engine.idle


def test_the_torch_path_follows_a_grammar(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = InlineEngine(checkpoint).one(constrained("a", PERSON, temperature=0.0)).ids
    monkeypatch.setattr("serving.engine.native.load_library", lambda: None)
    answer = InlineEngine(checkpoint).one(constrained("a", PERSON, temperature=0.0))
    assert answer.ids == expected
