"""The ASGI application: the routes, what stands before them, and the engine behind them.

    uvicorn serving.app:create_app --factory

configured by the environment: `NANOGPT_CHECKPOINT`, `NANOGPT_API_KEYS` and every other setting of
`serving/api/settings.py`. The engine is started as a process of its own, or found at
`NANOGPT_ENGINE` where several front ends share it.
"""

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from types import FrameType
from typing import Any

from fastapi import FastAPI
from fastapi.middleware import Middleware
from fastapi.middleware.gzip import GZipMiddleware

import nanogpt
from serving.api import decisions, errors, pages, responses, service, v1
from serving.api.middleware import Admission, Cors, RequestLog
from serving.api.models import Catalogue
from serving.api.schemas import ErrorAnswer
from serving.api.service import Metrics
from serving.api.settings import ApiSettings, read_settings
from serving.engine.client import EngineClient, EngineProcess
from serving.logs import configure

ENGINE_VARIABLE = "NANOGPT_ENGINE"
GC_OBJECTS = 10_000  # new ones between collections: of 700, parsing many lists takes twice as long

log = logging.getLogger("nanogpt.server")


def create_app(settings: ApiSettings | None = None, client: EngineClient | None = None) -> FastAPI:
    """Return the application; without arguments, one that the environment configures.

    A `client` is used as it is; else the application starts an engine, or finds the one that
    `NANOGPT_ENGINE` names, and ends with it.
    """
    if client is None:
        configure()
        _end_with_parent()
    if settings is None:
        settings = read_settings()
    metrics = Metrics()
    app = FastAPI(
        title="nanogpt",
        version=nanogpt.__version__,
        lifespan=partial(_lifespan, settings=settings, given=client),
        docs_url=None,  # FastAPI's pages for /openapi.json are fetched from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,  # Admission looks at it
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
        exception_handlers=errors.HANDLERS,
        middleware=[  # in the order in which they see a request
            Middleware(RequestLog, metrics=metrics),
            Middleware(Cors, settings=settings),
            Middleware(Admission, settings=settings),
        ],
    )
    app.state.settings, app.state.metrics = settings, metrics
    app.state.started, app.state.draining = time.time(), False
    app.include_router(service.router)
    for router in (v1.router, responses.router, decisions.router):
        app.include_router(router, prefix="/v1")
        app.include_router(router, include_in_schema=False)
    app.include_router(pages.router)
    files = pages.PageFiles(directory=pages.STATIC)
    app.mount("/static", GZipMiddleware(files, compresslevel=5), name="static")
    return app


@contextlib.asynccontextmanager
async def _lifespan(
    app: FastAPI, settings: ApiSettings, given: EngineClient | None
) -> AsyncIterator[dict[str, Any]]:
    with contextlib.nullcontext("") if given else running_engine(settings) as address:
        client = given or EngineClient(address, settings.stall_s)
        connecting = asyncio.create_task(_connect(client))
        app.state.client = client
        app.state.catalogue = Catalogue(client, lenient=settings.unknown_model == "default")
        gc.freeze()  # what was imported lives as long as the process
        gc.set_threshold(GC_OBJECTS, *gc.get_threshold()[1:])
        if threading.current_thread() is threading.main_thread():
            _drain_at_signals(app)
        try:
            yield {"settings": settings}  # for Connection
        finally:
            connecting.cancel()
            await client.close()


async def _connect(client: EngineClient) -> None:
    await client.connect(None)
    log.info("ready: %s", ", ".join(model.id for model in client.models()) or "no models yet")


@contextlib.contextmanager
def running_engine(settings: ApiSettings) -> Iterator[str]:
    """Give the address of the engine at `NANOGPT_ENGINE`, or of one that ends with the context."""
    if address := os.environ.get(ENGINE_VARIABLE):
        yield address
        return
    engine = EngineProcess(settings.engine_settings())
    engine.start()
    try:
        yield engine.address
    finally:
        engine.stop()


def _end_with_parent() -> None:
    """Send SIGTERM to this process when its parent ends, however that ends.

    Else a front end would hold the port, with no engine behind it.
    """
    if parent := multiprocessing.parent_process():

        def watch() -> None:
            parent.join()
            log.error("the parent process is gone; this front end ends")
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _drain_at_signals(app: FastAPI) -> None:
    """Drain when a signal ends the process, before the handler of its server."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        former = signal.getsignal(number)

        def handle(number: int, stack: FrameType | None, former: Any = former) -> None:
            loop.call_soon_threadsafe(_drain, app)
            if callable(former):
                former(number, stack)

        signal.signal(number, handle)
    term_at_hangup()


def _drain(app: FastAPI) -> None:
    """Be no longer ready; open answers may go on for `drain_s`, and fail then."""
    if not app.state.draining:
        app.state.draining, drain_s = True, app.state.settings.drain_s
        log.info("ending: open answers have %g s to finish", drain_s)
        loop = asyncio.get_running_loop()
        loop.call_later(drain_s, lambda: loop.create_task(app.state.client.close()))


def term_at_hangup() -> None:
    """Let SIGHUP, of a terminal that closes, be SIGTERM, unless it is ignored (nohup)."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
