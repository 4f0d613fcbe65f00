"""Run the server that the environment describes.

    NANOGPT_CHECKPOINT=runs/mine NANOGPT_PORT=5001 python -m serving

`serve.py` composes `conf/serve.yaml` and becomes this; one engine, `NANOGPT_WORKERS` front ends.
"""

import os
import signal
import socket
import sys
from contextlib import suppress

import uvicorn
from uvicorn.supervisors import Multiprocess

from nanogpt.command import FAILED, INTERRUPTED, WRONG_USAGE
from serving.api.auth import is_loopback
from serving.api.connection import Connection
from serving.api.settings import ApiSettings, read_settings
from serving.app import ENGINE_VARIABLE, running_engine, term_at_hangup
from serving.engine.messages import Settings
from serving.logs import configure

APP = "serving.app:create_app"
SLOW_START_S = 60  # a front end that answers its parent so late is not dead but busy


def main() -> int:
    """Serve until a signal ends the process; return the exit code."""
    configure()
    # uvicorn raises the signal that ended it once more when all is done.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    term_at_hangup()
    try:
        settings = read_settings()
        check_engine(settings.engine_settings())
        check_exposure(settings)
        with listen(settings) as listening:
            announce(settings, listening.getsockname()[1])
            run(settings, listening)
    except (ValueError, OSError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, ValueError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def check_engine(settings: Settings) -> None:
    """Raise ValueError for a device, or a dtype or a default model that it does not have."""
    is_for_cpus = settings.dtype in ("fp24", "int8")
    if settings.device != "cpu" and (settings.device != "auto" or is_for_cpus):  # needs torch
        from serving.engine.runner import check_device, choose_device

        check_device(settings.device)
        if is_for_cpus and choose_device(settings.device).type == "cuda":
            what = f"dtype={settings.dtype} has no CUDA kernels"
            raise ValueError(f"{what}; pass dtype=bf16 or fp32, or device=cpu")
    if settings.default_model is not None:
        from serving.engine.registry import Registry

        name = settings.default_model
        registry = Registry(settings.models, settings.runs_dir, name)
        if registry.default() is None:
            ids = ", ".join(entry.id for entry in registry.entries) or "none"
            raise ValueError(
                f"default_model={name} is none of the models ({ids}); pass one of them"
            )


def check_exposure(settings: ApiSettings) -> None:
    """Raise ValueError where other machines would be answered without a key."""
    if not settings.api_keys and not settings.insecure and not is_loopback(settings.host):
        raise ValueError(
            f"host={settings.host} lets other machines send requests, and there is no API key; set "
            "NANOGPT_API_KEYS, or pass insecure=true to answer anyone"
        )


def listen(settings: ApiSettings) -> socket.socket:
    """Return a socket that listens at the address; raises OSError where that is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(
            f"cannot listen at {settings.host}:{settings.port} ({reason}); pass another port="
        ) from error
    listening.set_inheritable(True)
    return listening


def announce(settings: ApiSettings, port: int) -> None:
    """Print the address of the server, with a request to it, if standard output can be written."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = ' -H "Authorization: Bearer YOUR_KEY"' if settings.api_keys else ""
    body = '{"messages": [{"role": "user", "content": "Hello"}]}'
    with suppress(OSError):
        print(
            f"{url}  the page; the API is at {url}/v1\n"
            f"  curl {url}/v1/chat/completions{key} "
            f"-H \"Content-Type: application/json\" -d '{body}'\n"
            f'  openai.OpenAI(base_url="{url}/v1", api_key="{"..." if key else "none"}")',
            flush=True,
        )


def run(settings: ApiSettings, listening: socket.socket) -> None:
    """Run the front ends on a socket, with one engine; raises OSError where they do not start."""
    config = uvicorn.Config(
        APP,
        factory=True,
        workers=settings.workers,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_s) + 5,
        timeout_worker_healthcheck=SLOW_START_S,
    )
    if settings.workers == 1:
        server = uvicorn.Server(config)
        server.run([listening])
        if not server.started:
            raise OSError("the server could not start; its log has the reason")
        return
    with running_engine(settings) as address:
        os.environ[ENGINE_VARIABLE] = address
        at_hangup = signal.getsignal(signal.SIGHUP)
        supervisor = Multiprocess(config, [listening])
        signal.signal(signal.SIGHUP, at_hangup)  # not a restart
        supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
