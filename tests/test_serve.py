"""serve.py: from the configuration to a server that ends as it should."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hydra import compose, initialize_config_dir

import serve
from serving.__main__ import announce, check_exposure
from serving.api.settings import ApiSettings, read_settings
from serving.app import ENGINE_VARIABLE, create_app
from serving.engine.messages import Settings
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, fixed_reply, generated

ROOT = Path(__file__).parent.parent
LIMITS_S = ("BODY", "QUEUE", "REQUEST", "WRITE")
COUNTS = ("MAX_OPEN", "MAX_OPEN_PER_KEY", "MAX_BODY_BYTES", "MAX_N", "MAX_PROMPTS", "MAX_QUEUE")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def composed(*overrides: str) -> ApiSettings:
    """Return the settings that a command line amounts to."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = compose("serve", overrides=list(overrides))
    return read_settings(**serve.chosen(config, overrides))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment without settings."""
    for name in os.environ:
        if name.startswith("NANOGPT_"):
            monkeypatch.delenv(name)


def test_the_configuration_s_defaults_are_the_settings_own(tmp_path: Path) -> None:
    settings = composed(f"runs_dir={tmp_path}")
    assert settings == ApiSettings(runs_dir=str(tmp_path))
    assert settings.engine_settings() == Settings(models=str(tmp_path), runs_dir=str(tmp_path))


def test_every_key_is_read_and_every_setting_has_a_key() -> None:
    lines = (ROOT / "conf" / "serve.yaml").read_text().splitlines()
    keys = set(yaml.safe_load("\n".join(lines))) - {"defaults", "hydra"}
    assert keys == set(ApiSettings.model_fields) - {"models"}
    bare = {line.partition(":")[0] for line in lines if ": " in line and "#" not in line}
    assert not bare & keys  # all are documented


def test_what_is_typed_reaches_the_settings(tmp_path: Path) -> None:
    typed = ("checkpoint=mine", "api_keys=[a,b]", "max_open_per_key=3", "queue_s=5", "dtype=int8")
    settings = composed(f"runs_dir={tmp_path}", *typed)
    assert settings.api_keys == ("a", "b")
    assert (settings.max_open_per_key, settings.queue_s) == (3, 5.0)
    engine = settings.engine_settings()
    assert (engine.models, engine.dtype) == ("mine", "int8")


def test_settings_travel_as_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ApiSettings(
        api_keys=("a", "b"), cors_origins=(), insecure=True, threads=2, cache_gb=None, queue_s=1.5
    )
    for name, text in settings.variables().items():
        monkeypatch.setenv(name, text)
    assert read_settings() == settings


def test_keys_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_API_KEYS", "one, two")
    assert composed(f"runs_dir={tmp_path}").api_keys == ("one", "two")


def test_settings_of_every_kind_are_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = {
        "NANOGPT_API_KEYS": "a",
        "NANOGPT_INSECURE": "True",
        "NANOGPT_MAX_OPEN_PER_KEY": "2",
        "NANOGPT_WRITE_S": "1.5",
        "NANOGPT_THREADS": "",
    }
    settings = ApiSettings(api_keys=("a",), insecure=True, max_open_per_key=2, write_s=1.5)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert read_settings() == settings


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("NANOGPT_MAX_N", "many", "a whole number"),
        ("NANOGPT_INSECURE", "perhaps", "true or false"),
        ("NANOGPT_QUEUE_S", "long", "a number"),
        ("NANOGPT_UNKNOWN_MODEL", "guess", "'error' or 'default'"),
    ],
)
def test_a_variable_of_the_wrong_kind_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}='{text}' should be {expected}"):
        read_settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("PORT", text) for text in ("-1", "65536", "5001.5")),
        *(("WORKERS", text) for text in ("0", "-1")),
        *((f"{name}_S", text) for name in LIMITS_S for text in ("0", "nan", "inf")),
        *((name, "0") for name in COUNTS),
        *((name, "0") for name in ("THREADS", "MAX_SLOTS", "CACHE_GB", "CHUNK_TOKENS")),
        *((name, "0") for name in ("MAX_MODELS", "MAX_QUEUE", "WATCH_S")),
        *((name, "-1") for name in ("CACHE_GB", "DRAIN_S", "THREADS")),
        ("CACHE_GB", "inf"),
        ("MAX_SLOTS", "9" * 30),
    ],
)
def test_a_setting_out_of_range_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"NANOGPT_{name}", text)
    with pytest.raises(ValueError, match=f"^NANOGPT_{name}='{text}' should be "):
        read_settings()


def test_a_variable_that_is_no_setting_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NANOGPT_API_KEYS", "NANOGPT_DATA_DIR"):
        monkeypatch.setenv(name, "a")
    read_settings()
    monkeypatch.setenv("NANOGPT_API_KEY", "a")
    with pytest.raises(ValueError, match=r"NANOGPT_API_KEY is no .*mean NANOGPT_API_KEYS"):
        read_settings()


def test_the_engine_s_models_have_no_variable_as_the_checkpoint_replaces_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "NANOGPT_MODELS" not in ApiSettings().variables()
    monkeypatch.setenv("NANOGPT_MODELS", "elsewhere")
    with pytest.raises(ValueError, match="NANOGPT_MODELS is no setting"):
        read_settings()


@pytest.mark.parametrize("command", [[str(ROOT / "serve.py")], ["-m", "serving"]])
def test_every_entry_point_refuses_an_unknown_variable(tmp_path: Path, command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NANOGPT_API_KEY": "secret"},
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean NANOGPT_API_KEYS?" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_factory_refuses_an_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_API_KEY", "secret")
    with pytest.raises(ValueError, match="did you mean NANOGPT_API_KEYS"):
        create_app()


def test_a_variable_is_a_setting_unless_the_key_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("RUNS_DIR", str(tmp_path)), ("MAX_SLOTS", "8"), ("MAX_N", "3")):
        monkeypatch.setenv(f"NANOGPT_{name}", text)
    started: list[ApiSettings] = []
    monkeypatch.setattr(serve, "become_server", lambda settings: started.append(settings))
    monkeypatch.setattr(serve, "composed", [])
    monkeypatch.setattr(sys, "argv", ["serve.py", "max_n=4"])
    assert serve.main(["max_n=4"]) == 0
    (settings,) = started
    assert (settings.max_slots, settings.max_n) == (8, 4)
    assert settings.engine_settings().models == str(tmp_path)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:5112/v1"),
        ("0.0.0.0", "http://127.0.0.1:5112/v1"),
        ("::", "http://[::1]:5112/v1"),
        ("::1", "http://[::1]:5112/v1"),
        ("localhost", "http://localhost:5112/v1"),
    ],
)
def test_the_printed_address_can_be_opened(
    capsys: pytest.CaptureFixture[str], host: str, address: str
) -> None:
    announce(ApiSettings(host=host), 5112)
    assert address in capsys.readouterr().out


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_are_not_let_in_without_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="NANOGPT_API_KEYS"):
        check_exposure(ApiSettings(host=host))
    check_exposure(ApiSettings(host=host, api_keys=("a",)))
    check_exposure(ApiSettings(host=host, insecure=True))
    check_exposure(ApiSettings())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prot=1"], 2, "there is no key prot; did you mean port?"),
        (["max_n=many", "runs_dir=."], 2, "max_n='many' should be a whole number"),
        (["max_models=0", "runs_dir=."], 2, "max_models=0 should be at least 1"),
        (["default_model=nope", "runs_dir=."], 2, "default_model=nope is none of the models"),
        (["device=cuda:77", "runs_dir=."], 2, "device=cuda:77 is not on this machine"),
        (["checkpoint=nowhere"], 1, "there is no checkpoint 'nowhere'"),
        (["runs_dir=nowhere"], 1, "there are no runs at nowhere"),
        (["host=0.0.0.0", "runs_dir=."], 2, "host=0.0.0.0 lets other machines send"),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "serve.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("NANOGPT_")},
        timeout=60,
    )
    assert done.returncode == code
    assert done.stderr.startswith("serve.py: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@contextlib.contextmanager
def running(engine: FakeEngine) -> Iterator[None]:
    """Run an engine in a thread."""
    began, ended = threading.Event(), threading.Event()

    async def run() -> None:
        async with engine:
            began.set()
            while not ended.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert began.wait(10)
    try:
        yield
    finally:
        ended.set()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(
    engine: FakeEngine, output: Mapping[str, Any] | None = None, **variables: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server of its own before an engine; give its address and process.

    `output` are options of subprocess.
    """
    port = free_port()
    environment = {
        **os.environ,
        ENGINE_VARIABLE: f"unix:{engine.path}",
        "NANOGPT_PORT": str(port),
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    with running(engine):
        command = [sys.executable, "-m", "serving"]
        server = subprocess.Popen(command, env=environment, **(output or {}))
        try:
            url = f"http://127.0.0.1:{port}"
            assert eventually(lambda: answers(f"{url}/ready"), 60)
            yield url, server
        finally:
            server.kill()
            server.wait()


def streamed(
    url: str, server: subprocess.Popen[bytes], max_tokens: int, signum: int = signal.SIGTERM
) -> list[str]:
    """Return the lines of a stream, during which the server receives a signal to end."""
    body = {"max_tokens": max_tokens, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        server.send_signal(signum)
        return [first, *(line for line in lines if line)]


@POSIX
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_finishes_its_answers_on_a_signal_and_exits_with_0(
    tmp_path: Path, workers: int, signum: int
) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 100), delay_s=0.01)
    with started(engine, NANOGPT_WORKERS=str(workers)) as (url, server):
        lines = streamed(url, server, 100, signum)
        assert server.wait(30) == 0
    assert lines[-1] == "data: [DONE]"
    assert not any('"error"' in line for line in lines)
    assert len(generated(engine)) == 1


@POSIX
def test_a_signal_ends_a_server_that_starts(tmp_path: Path) -> None:
    variables = {ENGINE_VARIABLE: f"unix:{tmp_path}/e", "NANOGPT_PORT": "0"}
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "serving"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as server:
        assert server.stdout
        server.stdout.readline()  # the address, before uvicorn handles signals
        server.terminate()
        try:
            assert server.wait(30) == 0
        finally:
            server.kill()


@POSIX
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path, workers: int) -> None:
    def as_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("a"))
    output = {"preexec_fn": as_nohup}
    with started(engine, output, NANOGPT_WORKERS=str(workers)) as (url, server):
        server.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert httpx.get(f"{url}/ready").status_code == 200
        assert server.poll() is None


@POSIX
def test_an_answer_that_outlasts_the_drain_ends_with_an_error(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=fixed_reply("x" * 900), delay_s=0.02)
    with started(engine, NANOGPT_DRAIN_S="0.5") as (url, server):
        lines = streamed(url, server, 900)
        assert server.wait(15) == 0
    assert '"error"' in lines[-2]
    assert lines[-1] == "data: [DONE]"


@POSIX
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_outlives_its_output(
    tmp_path: Path, failing_output: dict[str, Any], workers: int
) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e")
    with started(engine, failing_output, NANOGPT_WORKERS=str(workers)) as (url, server):
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
        server.terminate()
        assert server.wait(30) == 0


@POSIX
def test_every_process_logs_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with started(FakeEngine(f"unix:{tmp_path}/e"), NANOGPT_WORKERS="2") as (_, server):
        server.terminate()
        server.wait(30)
    messages = [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()]
    assert f"Started parent process [{server.pid}]" in messages


@POSIX
def test_front_ends_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    with started(FakeEngine(f"unix:{tmp_path}/e"), NANOGPT_WORKERS="2") as (url, server):
        server.kill()
        assert eventually(lambda: not is_listening(url), 20)


def is_listening(url: str) -> bool:
    """Return whether anyone holds the port."""
    with socket.socket() as probe:
        return probe.connect_ex((httpx.URL(url).host, httpx.URL(url).port)) == 0


def answers(url: str) -> bool:
    """Return whether a server is there and well."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        time.sleep(0.1)
        return False
