"""The grammar of a request's answers: of a JSON schema, a regular expression, a choice or calls.

The fields are the OpenAI API's `response_format` and vLLM's `guided_*` and `structured_outputs`.
"""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher, grammar_from

from serving.api.errors import ApiError
from serving.api.schemas import Function, JsonSchema, SamplingRequest
from serving.engine import grammar

MAX_CHARS, MAX_REFERENCES = 2**16, 500  # of a schema
MAX_KNOWN = 1024  # grammars that need no check
CHECK_S = 10.0  # on a busy machine
CHECK = [sys.executable, grammar.__file__]
NO_PARAMETERS: dict[str, Any] = {"properties": {}, "additionalProperties": False}
OPTIONS: Any = {
    # Endless white space would be JSON, too, and is what an untrained model writes.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # One spelling of each text, or `{"\u0061": 1}` would evade the schema of "a".
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": False,
    "coerce_one_of": False,
}

# Characters that those escapes cannot spell, which llguidance leaves out of constants and patterns.
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
CONTROL_ESCAPE = re.compile(
    r"\\(?:x|u00)(?:[01][0-9a-f]|7f)|\\[xu]\{0*(?:[01]?[0-9a-f]|7f)\}", re.IGNORECASE
)
CHARACTER_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")  # which may do without them

_checker = ThreadPoolExecutor(1, thread_name_prefix="check")
_known: dict[str, str] = {}  # why a grammar cannot be used, "" for one that can


async def grammar_of(body: SamplingRequest, functions: Sequence[Function] = ()) -> str:
    """Return the grammar of a request, "" for any text; raises ApiError for what has none.

    With `functions` it is that of a call of one of them, as `Function.text` spells it.
    """
    given = [(param, kind, value) for param, kind, value in _given(body) if value is not None]
    if functions:  # response_format is for texts, and some clients send both
        given = [own for own in given if own[0] != "response_format"]
        schemas = {f.name: {"type": "object", **(f.parameters or NO_PARAMETERS)} for f in functions}
        given.append(("tools", "tools", schemas))
    if not given:
        return ""
    (param, kind, value), *others = given
    try:
        if others:
            raise ValueError(f"{others[0][0]} asks for another format; use one of them")
        text = _grammar(kind, value)
        if text not in _known:
            loop = asyncio.get_running_loop()
            reason = await loop.run_in_executor(_checker, _check, text, kind, value)
            if len(_known) >= MAX_KNOWN:
                _known.clear()
            _known[text] = reason
        if reason := _known[text]:
            raise ValueError(reason)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ApiError(400, f"{param} cannot be followed: {reason}.", param=param) from error
    return text


def _given(body: SamplingRequest) -> Iterator[tuple[str, str, Any]]:
    """Yield the fields that constrain an answer, with the kinds and values of what they ask for."""
    if (form := body.response_format) and form.type != "text":
        about = form.json_schema or JsonSchema()
        if form.type == "json_schema" and (about.name is None or about.schema_ is None):
            message = "response_format needs a json_schema with a name and a schema."
            raise ApiError(400, message, param="response_format")
        is_any = form.type == "json_object"
        yield "response_format", "json", {"type": "object"} if is_any else about.schema_
    for kind, value in (body.structured_outputs or {}).items():
        yield "structured_outputs", kind, value
    for kind in ("json", "regex", "choice"):
        yield f"guided_{kind}", kind, getattr(body, f"guided_{kind}")


def _grammar(kind: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_CHARS:
        raise ValueError(f"it has {len(text)} characters, more than {MAX_CHARS}")
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice" and value:
        return grammar_from("choice", text)
    schema = json.loads(text)
    if kind == "tools":
        parts = [json.loads(_grammar("json", own))["grammars"][0] for own in schema.values()]
        texts = [json.dumps(Function(name=name).text) for name in schema]
        calls = " | ".join(f"{text} @call{i}" for i, text in enumerate(texts))
        parts = [{**part, "name": f"call{i}"} for i, part in enumerate(parts)]
        return json.dumps({"grammars": [{"lark_grammar": f"start: {calls}"}, *parts]})
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    schema.pop("x-guidance", None)  # options of llguidance
    return LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)


def _check(grammar: str, kind: str, value: Any) -> str:
    """Return why a grammar cannot be used, "" for one that can; some end their process."""
    try:
        grammars = {grammar}
        for schema in value.values() if kind == "tools" else [value] if kind == "json" else []:
            check_schema(json.loads(schema) if isinstance(schema, str) else schema)
            grammars.add(_grammar("json", schema))
        given = json.dumps([*grammars])
        done = subprocess.run(CHECK, input=given, capture_output=True, text=True, timeout=CHECK_S)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    except ValueError as error:
        return str(error)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"a keyword or $ref is malformed ({error})"
    return "it is too large to compile" if done.returncode else done.stdout


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError for what grammars get wrong: endless references, counts, control characters.

    A name that the schema does not list may come twice, and is one property.
    """
    nodes: list[Any] = [schema]
    targets: dict[str, Any] = {}
    for node in nodes:  # which grow meanwhile
        if isinstance(node, str) and CONTROL.search(node):
            raise ValueError(f"answers cannot spell the control character in {node[:80]!r}")
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += [*node, *node.values()]
            for pattern in (node.get("pattern"), *(node.get("patternProperties") or ())):
                text = CHARACTER_CLASS.sub("", pattern) if isinstance(pattern, str) else ""
                if CONTROL_ESCAPE.search(text):
                    raise ValueError(f"answers cannot spell what {pattern[:80]!r} escapes")
            least, limit = node.get("minProperties"), 1 + len(node.get("required") or ())
            if isinstance(least, int) and least > limit:
                raise ValueError(f"minProperties above {limit}, the required ones and one more")
            if isinstance(reference := node.get("$ref"), str):
                targets[reference] = _target(schema, reference)
    if len(targets) > MAX_REFERENCES:
        raise ValueError(f"it has {len(targets)} references, more than {MAX_REFERENCES}")
    ending: set[str] = set()
    while new := {r for r in targets.keys() - ending if _ends(targets[r], ending)}:
        ending |= new
    if endless := targets.keys() - ending:
        raise ValueError(f"no value of $ref {min(endless)!r} has an end")


def _target(schema: Any, reference: str) -> Any:
    root, *names = reference.split("/")
    if root != "#":
        raise ValueError(f"$ref {reference!r} names no part of the schema (#/...)")
    for name in names:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        schema = schema[int(name) if isinstance(schema, list) else name]
    return schema


def _ends(schema: Any, ending: set[str]) -> bool:
    """Return whether a schema has a finite value, as those of the references in `ending` have."""
    if not isinstance(schema, dict):
        return True
    ends = partial(_ends, ending=ending)
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    named, others = schema.get("properties", {}), schema.get("additionalProperties")
    required = [named.get(name, others) for name in schema.get("required", [])]
    items = [*schema.get("prefixItems", []), schema.get("items")][: schema.get("minItems", 0)]
    return (
        schema.get("$ref") in {None, *ending}
        and all(map(ends, schema.get("allOf", [])))
        and all(any(map(ends, schema[some])) for some in ("anyOf", "oneOf") if some in schema)
        and (
            not {"const", "enum"}.isdisjoint(schema)
            or not {*kinds} <= {"object", "array"}
            or ("object" in kinds and all(map(ends, required)))
            or ("array" in kinds and all(map(ends, items)))
        )
    )
