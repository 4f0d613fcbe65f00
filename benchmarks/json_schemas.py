"""Answer by every schema of the JSON Schema test suite, and validate the answers.

    git clone https://github.com/json-schema-org/JSON-Schema-Test-Suite
    python serve.py checkpoint=RUN
    python benchmarks/json_schemas.py http://127.0.0.1:5001 --suite JSON-Schema-Test-Suite

Prints how many distinct schemas are refused, and how many answers are cut at `--max-tokens`, valid,
or not valid by the `jsonschema` package; each of the last, and each answer of a server error.
"""

import argparse
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft7Validator, Draft202012Validator

DRAFTS: dict[str, Any] = {"draft7": Draft7Validator, "draft2020-12": Draft202012Validator}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--suite", type=Path, required=True, help="a checkout of the test suite")
    parser.add_argument("--streams", type=int, default=8, help="concurrent requests")
    parser.add_argument("--max-tokens", type=int, default=100)
    options = parser.parse_args()

    distinct: dict[str, str] = {}
    for draft in DRAFTS:
        for path in sorted((options.suite / "tests" / draft).rglob("*.json")):
            for group in json.loads(path.read_text(encoding="utf-8")):
                if isinstance(group["schema"], dict):
                    distinct[json.dumps(group["schema"], sort_keys=True)] = draft
    print(f"{len(distinct)} schemas")
    with (
        httpx.Client(base_url=options.url, timeout=600) as client,
        ThreadPoolExecutor(options.streams) as pool,
    ):
        jobs = [
            pool.submit(judge, client, json.loads(text), draft, options.max_tokens)
            for text, draft in distinct.items()
        ]
        outcomes = Counter(job.result() for job in jobs)
    for outcome, n in outcomes.most_common():
        print(f"{n:6} {outcome}")


def judge(client: httpx.Client, schema: dict[str, Any], draft: str, max_tokens: int) -> str:
    """Return what became of a request by this schema."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    messages = [{"role": "user", "content": "Answer."}]
    request = {"messages": messages, "max_tokens": max_tokens, "response_format": form, "seed": 1}
    answer = client.post("/v1/chat/completions", json=request)
    if answer.status_code == 400:
        return "refused"
    if answer.status_code != 200:
        print(f"{answer.status_code}: {json.dumps(schema)}", flush=True)
        return "server error"
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] == "length":
        return "cut"
    content = choice["message"]["content"]
    try:
        is_valid = DRAFTS[draft](schema).is_valid(json.loads(content))
    except ValueError:
        is_valid = False
    except re.error:
        return "not checked: Python lacks the pattern's syntax"
    if not is_valid:
        print(f"not valid: {content!r} by {json.dumps(schema)}", flush=True)
    return "valid" if is_valid else "not valid"


if __name__ == "__main__":
    main()
