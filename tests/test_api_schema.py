"""Requests generated from the OpenAPI document, valid and invalid."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.fake_engine import FakeEngine
from tests.front_end import fixed_reply, serve

SCHEMATHESIS = Path(sysconfig.get_path("scripts")) / "schemathesis"
CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance"


@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="needs schemathesis, of the dev extra")
@pytest.mark.slow
def test_no_request_is_a_server_error(tmp_path: Path) -> None:
    with serve(FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("Grüße"))) as url:
        options = ["--checks", CHECKS, "--max-examples", "20", "--seed", "1"]
        options += ["--phases", "fuzzing"]
        done = subprocess.run(
            [str(SCHEMATHESIS), "run", f"{url}/openapi.json", *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-5000:]
