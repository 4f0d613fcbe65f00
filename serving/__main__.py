"""Run the server that the environment describes.

    NANOGPT_CHECKPOINT=runs/mine NANOGPT_PORT=5001 python -m serving

`serve.py` composes `conf/serve.yaml` and becomes this; one engine, `NANOGPT_WORKERS` front ends.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping

import uvicorn
from uvicorn.supervisors import Multiprocess

from serving import environment
from serving.api.auth import is_loopback
from serving.api.connection import Connection
from serving.api.settings import ApiSettings, Binding
from serving.app import ENGINE_VARIABLE, engine_settings, term_at_hangup
from serving.engine.client import EngineProcess
from serving.engine.messages import Settings
from serving.logs import configure

APP = "serving.app:create_app"
BACKLOG = 2048  # connections that may wait to be accepted
SLOW_START_S = 60  # a front end that answers its parent so late is not dead but busy
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def main() -> int:
    """Serve until told to end; return the exit code."""
    configure()
    # uvicorn raises the signal that ended it once more when all is done.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    term_at_hangup()
    try:
        binding, settings = read_settings(os.environ)
    except ValueError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return WRONG_USAGE
    try:
        check_exposure(binding.host, settings)
        with listen(binding) as listening:
            announce(binding, listening.getsockname()[1], settings)
            run(binding, settings, listening)
    except (ValueError, OSError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def read_settings(variables: Mapping[str, str]) -> tuple[Binding, ApiSettings]:
    """Return the settings of the environment, the engine's checked too, before anything starts.

    Raises ValueError for a variable that is no setting, for a value out of range, and for a device
    or a default model that does not exist; only these two need torch.
    """
    environment.check_names(variables, Binding, ApiSettings, Settings)
    engine = engine_settings(variables)
    if engine.device not in ("auto", "cpu"):
        from serving.engine.loading import check_device

        check_device(engine.device)
    if engine.default_model is not None:
        from serving.engine.registry import Registry

        Registry(engine.models, engine.runs_dir, engine.default_model).check_default()
    return environment.read(Binding, variables), environment.read(ApiSettings, variables)


def check_exposure(host: str, settings: ApiSettings) -> None:
    """Raise ValueError where other machines could ask without a key."""
    if not settings.api_keys and not settings.insecure and not is_loopback(host):
        raise ValueError(
            f"host={host} lets other machines ask, and there is no API key; set NANOGPT_API_KEYS, "
            "or pass insecure=true to answer anyone"
        )


@contextlib.contextmanager
def listen(binding: Binding) -> Iterator[socket.socket]:
    """Give a socket bound to the address; raises OSError where that is taken."""
    family = socket.AF_INET6 if ":" in binding.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((binding.host, binding.port))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise OSError(
                f"cannot listen at {binding.host}:{binding.port} ({reason}); pass another port="
            ) from error
        listening.set_inheritable(True)
        yield listening


def announce(binding: Binding, port: int, settings: ApiSettings) -> None:
    """Print where the server is, and how to ask it."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(binding.host, binding.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = ' -H "Authorization: Bearer YOUR_KEY"' if settings.api_keys else ""
    body = '{"messages": [{"role": "user", "content": "Hello"}]}'
    print(
        f"{url}  the page; the API is at {url}/v1\n"
        f"  curl {url}/v1/chat/completions{key} -H \"Content-Type: application/json\" -d '{body}'\n"
        f'  openai.OpenAI(base_url="{url}/v1", api_key="{"..." if key else "none"}")',
        flush=True,
    )


def run(binding: Binding, settings: ApiSettings, listening: socket.socket) -> None:
    """Run the front ends on a socket; more than one share an engine that starts here."""
    config = uvicorn.Config(
        APP,
        factory=True,
        host=binding.host,
        port=binding.port,
        workers=binding.workers,
        backlog=BACKLOG,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_s) + 5,
        timeout_worker_healthcheck=SLOW_START_S,
    )
    if binding.workers == 1:
        server = uvicorn.Server(config)
        server.run([listening])
        if not server.started:
            raise OSError("the server could not start; its log says why")
        return
    with shared_engine():
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
        handler = signal.getsignal(hangup)
        supervisor = Multiprocess(config, [listening])
        if hangup != signal.SIGTERM:
            signal.signal(hangup, handler)
        supervisor.run()


@contextlib.contextmanager
def shared_engine() -> Iterator[None]:
    """Let all front ends find one engine: the one that the environment names, or a new one."""
    if os.environ.get(ENGINE_VARIABLE):
        yield
        return
    engine = EngineProcess(engine_settings(os.environ))
    os.environ[ENGINE_VARIABLE] = engine.address
    engine.start()
    try:
        yield
    finally:
        engine.stop()


if __name__ == "__main__":
    sys.exit(main())
