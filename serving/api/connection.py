"""Connections: what is answered before the application hears of it, as errors are everywhere.

uvicorn runs this where `python -m serving` started it. Under another server the application refuses
requests too, but later: that takes about five times as long, which counts when a thousand come at
once.
"""

import asyncio
import json
import logging
from typing import Any

from starlette.datastructures import Headers
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.api.cors import Origins
from serving.api.errors import ApiError
from serving.api.limits import Arrivals, busy
from serving.api.logs import new_request_id
from serving.api.metrics import Metrics
from serving.api.settings import ApiSettings
from serving.logs import of_request

MAX_HEAD_BYTES = 2**16  # of a request line and its headers
LOG_S = 1.0  # many refused at once are one line of the log

log = logging.getLogger("nanogpt.access")


class Door:
    """Answers of a front end to those who do not get in."""

    def __init__(
        self, settings: ApiSettings, metrics: Metrics, arrivals: Arrivals, origins: Origins
    ) -> None:
        self.settings = settings
        self.arrivals = arrivals
        self._metrics = metrics
        self._origins = origins
        self._n_refused = 0

    def answer(self, method: str, error: ApiError, asked: Headers, *, close: bool) -> bytes:
        """Return a whole answer, and count it."""
        body = json.dumps(error.content()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": new_request_id(asked),
            "vary": "Origin",
            "cache-control": "no-store",
            **self._origins.headers(asked.get("origin", "")),
            **error.headers,
            **({"connection": "close"} if close else {}),
        }
        self._metrics.count(method, "refused", error.status, 0.0)
        self._note()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return STATUS_LINE[error.status] + lines.encode("latin-1") + b"\r\n" + body

    def _note(self) -> None:
        if not self._n_refused:
            asyncio.get_running_loop().call_later(LOG_S, self._log)
        self._n_refused += 1

    def _log(self) -> None:
        fields = {"refused": self._n_refused}
        log.warning("refused %d requests as they came", self._n_refused, extra={"fields": fields})
        self._n_refused = 0


class Connection(HttpToolsProtocol):
    """A connection that refuses what comes while the front end is full, too slowly, or as no HTTP.

    A request that is refused is read to its end all the same: an answer before that is lost to
    clients that still write (the system resets their connection). A client that does not take what
    was sent is cut off: to close would be to wait for it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._door: Door = self.app_state["door"]
        self._n_head_bytes = 0
        self._in_head = True
        self._refused = False
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._door.arrivals.n += 1
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look_later()  # what is left of an answer does not pause the writing

    def data_received(self, data: bytes) -> None:
        self._n_head_bytes += len(data) if self._in_head else 0
        super().data_received(data)
        if self._in_head and self._n_head_bytes > MAX_HEAD_BYTES:
            message = f"The headers are larger than {MAX_HEAD_BYTES:,} bytes."
            self._answer(ApiError(431, message), close=True)

    def send_400_response(self, msg: str) -> None:
        self._answer(ApiError(400, "This is not HTTP.", code="invalid_http"), close=True)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._refused = False
        if not self.transport.get_write_buffer_size():
            self._taken()
        self._expect()

    def on_headers_complete(self) -> None:
        self._in_head, self._n_head_bytes = False, 0
        idle = self.cycle is None or self.cycle.response_complete
        full = len(self.tasks) >= self._door.settings.max_open
        self._refused = full and idle and self.parser.get_method() == b"POST"
        if not self._refused:
            super().on_headers_complete()
        elif self.expect_100_continue:
            self._answer(busy(), close=True)

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = True
        self._arrived()
        if not self._refused:
            super().on_message_complete()
        elif not self.transport.is_closing():
            self._answer(busy(), close=not self.parser.should_keep_alive())

    def _answer(self, error: ApiError, *, close: bool) -> None:
        asked = Headers(raw=self.headers or [])
        self.transport.write(self._door.answer("POST", error, asked, close=close))
        if close:
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _expect(self) -> None:
        """Wait for a whole request, but not for long."""
        if self._late is None:
            self._late = self.loop.call_later(self._door.settings.body_s, self._is_late)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _is_late(self) -> None:
        self._late = None
        if self._in_head or self._refused or self.cycle.response_complete:
            self.transport.close()
        else:  # the application waits for the body, and says so where it is late
            self._expect()

    def _look_later(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(self._door.settings.write_s, self._look)

    def _taken(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _look(self) -> None:
        self._unread = None
        if not self.transport.get_write_buffer_size():
            return
        state = self.cycle.scope["state"] if self.cycle else {}
        extra = of_request(state.get("request_id", ""))
        log.warning("a client read too slowly; it is cut off", extra=extra)
        self.transport.abort()
