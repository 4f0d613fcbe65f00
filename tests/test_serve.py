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
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import serve
from serving import environment
from serving.__main__ import announce, check_exposure
from serving.api.settings import ApiSettings, Binding
from serving.app import ENGINE_VARIABLE, create_app
from serving.engine.messages import Settings
from tests.fake_engine import FakeEngine
from tests.front_end import eventually, generated, says

ROOT = Path(__file__).parent.parent
LIMITS_S = ("BODY", "QUEUE", "REQUEST", "WRITE")
COUNTS = ("MAX_OPEN", "MAX_OPEN_PER_KEY", "MAX_BODY_BYTES", "MAX_N", "MAX_PROMPTS", "MAX_QUEUE")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def composed(*overrides: str) -> dict[str, str]:
    """Return the environment that a command line amounts to."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = OmegaConf.to_container(compose("serve", overrides=list(overrides)), resolve=True)
    assert isinstance(config, dict)
    typed = {override.partition("=")[0] for override in overrides}
    named = {str(key): value for key, value in config.items()}
    return serve.to_variables(named | serve.from_environment(named.keys() - typed))


def test_the_configuration_s_defaults_are_the_settings_own(tmp_path: Path) -> None:
    variables = composed(f"runs_dir={tmp_path}")
    assert environment.read(ApiSettings, variables) == ApiSettings(runs_dir=str(tmp_path))
    assert environment.read(Binding, variables) == Binding()
    ours = Settings(models=str(tmp_path), runs_dir=str(tmp_path))
    assert environment.read(Settings, variables) == ours


def test_every_key_is_read_and_every_setting_has_a_key() -> None:
    keys = set(yaml.safe_load((ROOT / "conf" / "serve.yaml").read_text())) - {"defaults", "hydra"}
    settings = {field.name for kind in (Binding, ApiSettings, Settings) for field in fields(kind)}
    assert keys - {"checkpoint"} == settings - {"models"}


def test_what_is_typed_reaches_the_settings(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    typed = ("checkpoint=mine", "api_keys=[a,b]", "max_open_per_key=3", "queue_s=5", "dtype=int8")
    variables = composed(f"runs_dir={tmp_path}", *typed)
    settings = environment.read(ApiSettings, variables)
    assert settings.api_keys == ("a", "b")
    assert (settings.max_open_per_key, settings.queue_s) == (3, 5.0)
    engine = environment.read(Settings, variables)
    assert (engine.models, engine.dtype) == (str(tmp_path / "mine"), "int8")


def test_keys_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_API_KEYS", "one, two")
    variables = composed(f"runs_dir={tmp_path}")
    assert environment.read(ApiSettings, variables).api_keys == ("one", "two")


def test_settings_of_every_kind_are_read_from_the_environment() -> None:
    variables = {
        "NANOGPT_API_KEYS": "a",
        "NANOGPT_INSECURE": "True",
        "NANOGPT_MAX_OPEN_PER_KEY": "2",
        "NANOGPT_WRITE_S": "1.5",
    }
    settings = ApiSettings(api_keys=("a",), insecure=True, max_open_per_key=2, write_s=1.5)
    assert environment.read(ApiSettings, variables) == settings


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("NANOGPT_MAX_N", "many", "a valid integer"),
        ("NANOGPT_INSECURE", "perhaps", "a valid boolean"),
        ("NANOGPT_QUEUE_S", "long", "a valid number"),
        ("NANOGPT_UNKNOWN_MODEL", "guess", "'error' or 'default'"),
    ],
)
def test_a_variable_of_the_wrong_kind_is_named(name: str, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='{text}' should be {expected}"):
        environment.read(ApiSettings, {name: text})


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        *((Binding, "PORT", text) for text in ("-1", "65536", "5001.5")),
        *((Binding, "WORKERS", text) for text in ("0", "-1")),
        *((ApiSettings, f"{name}_S", text) for name in LIMITS_S for text in ("0", "nan", "inf")),
        *((ApiSettings, name, "0") for name in COUNTS),
        *((Settings, name, "0") for name in ("THREADS", "MAX_SLOTS", "CACHE_GB", "CHUNK_TOKENS")),
        *((Settings, name, "0") for name in ("MAX_MODELS", "MAX_QUEUE", "WATCH_S")),
        *((Settings, name, "-1") for name in ("CACHE_GB", "DRAIN_S", "THREADS")),
        (Settings, "CACHE_GB", "inf"),
        (Settings, "MAX_SLOTS", "9" * 30),
    ],
)
def test_a_setting_out_of_range_is_named(kind: type, name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"^NANOGPT_{name}='{text}' should be "):
        environment.read(kind, {f"NANOGPT_{name}": text})


def test_a_variable_that_is_no_setting_is_refused_with_the_nearest_name() -> None:
    known = ["PATH", "NANOGPT_API_KEYS", "NANOGPT_CHECKPOINT", "NANOGPT_DATA_DIR"]
    environment.check_names(known, ApiSettings)
    with pytest.raises(ValueError, match=r"NANOGPT_API_KEY is no .*mean NANOGPT_API_KEYS"):
        environment.check_names(["NANOGPT_API_KEY"], ApiSettings)


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
    started: list[Any] = []
    monkeypatch.setattr(serve, "become_server", lambda config: started.append(config))
    monkeypatch.setattr(serve, "composed", [])
    monkeypatch.setattr(sys, "argv", ["serve.py", "max_n=4"])
    assert serve.main(["max_n=4"]) == 0
    variables = serve.to_variables(started[0])
    assert environment.read(Settings, variables).max_slots == 8
    assert environment.read(ApiSettings, variables).max_n == 4
    assert environment.read(Settings, variables).models == str(tmp_path)


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
    announce(Binding(host=host), 5112, ApiSettings())
    assert address in capsys.readouterr().out


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_are_not_let_in_without_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="NANOGPT_API_KEYS"):
        check_exposure(host, ApiSettings())
    check_exposure(host, ApiSettings(api_keys=("a",)))
    check_exposure(host, ApiSettings(insecure=True))
    check_exposure("127.0.0.1", ApiSettings())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["prot=1"], 2, "there is no key prot; did you mean port?"),
        (["max_n=many", "runs_dir=."], 2, "max_n='many' should be a valid integer"),
        (["max_models=0", "runs_dir=."], 2, "max_models='0' should be greater than or equal to 1"),
        (["default_model=nope", "runs_dir=."], 2, "default_model=nope is none of the models"),
        (["device=cuda:77", "runs_dir=."], 2, "device=cuda:77 is not on this machine"),
        (["checkpoint=nowhere"], 1, "there is no checkpoint 'nowhere'"),
        (["runs_dir=nowhere"], 1, "there are no runs at nowhere"),
        (["host=0.0.0.0", "runs_dir=."], 1, "host=0.0.0.0 lets other machines ask"),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, arguments: list[str], code: int, said: str
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
    assert said in done.stderr
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
    """Return the lines of a stream, during which the server is told to end."""
    body = {"max_tokens": max_tokens, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        server.send_signal(signum)
        return [first, *(line for line in lines if line)]


@POSIX
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_told_to_end_finishes_its_answers_and_ends_with_0(
    tmp_path: Path, workers: int, signum: int
) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=says("x" * 100), delay_s=0.01)
    with started(engine, NANOGPT_WORKERS=str(workers)) as (url, server):
        lines = streamed(url, server, 100, signum)
        assert server.wait(30) == 0
    assert lines[-1] == "data: [DONE]"
    assert not any('"error"' in line for line in lines)
    assert len(generated(engine)) == 1


@POSIX
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path, workers: int) -> None:
    def as_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    engine = FakeEngine(f"unix:{tmp_path}/e", reply=says("a"))
    output = {"preexec_fn": as_nohup}
    with started(engine, output, NANOGPT_WORKERS=str(workers)) as (url, server):
        server.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert httpx.get(f"{url}/ready").status_code == 200
        assert server.poll() is None


@POSIX
def test_an_answer_that_outlasts_the_drain_is_told_so(tmp_path: Path) -> None:
    engine = FakeEngine(f"unix:{tmp_path}/e", reply=says("x" * 900), delay_s=0.02)
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
