"""Connections: the limits below HTTP, for any server that uvicorn runs.

    uvicorn serving.app:create_app --factory --http serving.api.connection:Connection

as `python -m serving` does. An application learns of a request when its headers are complete, and
cannot cut off a client that does not read; all other limits are in `serving/api/middleware.py`.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.logs import of_request

MAX_HEAD_BYTES = 2**16  # of a request line and its headers

log = logging.getLogger("nanogpt.access")


class Connection(HttpToolsProtocol):
    """A connection that ends where a request is not sent, or an answer not read, in time."""

    def __init__(self, *, app_state: dict[str, Any], **options: Any) -> None:
        super().__init__(app_state=app_state, **options)
        self._settings = app_state["settings"]
        self._in_head = True  # and not in a body
        self._n_head_bytes = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer("head", self._settings.body_s, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer("head")
        self._stop_timer("write")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_answering:
            self._start_timer("head", self._settings.body_s, self.transport.close)
        self._n_head_bytes += len(data) if self._in_head else 0
        super().data_received(data)
        if self._n_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are larger than {MAX_HEAD_BYTES:,} bytes.")

    def on_headers_complete(self) -> None:
        self._in_head, self._n_head_bytes = False, 0
        self._stop_timer("head")
        if not self.transport.get_write_buffer_size():
            self._stop_timer("write")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_answering:  # what is left is too little to pause the writing
            self._start_timer("write", self._settings.write_s, self._check_read)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer("write", self._settings.write_s, self._check_read)

    def resume_writing(self) -> None:
        self._stop_timer("write")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self._is_answering:  # an earlier request
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _start_timer(self, name: str, seconds: float, action: Any) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, action)

    def _stop_timer(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def _check_read(self) -> None:
        del self._timers["write"]
        if self.transport.get_write_buffer_size():
            extra = of_request(self.cycle.scope["state"]["request_id"])
            log.warning("a client read too slowly; it is cut off", extra=extra)
            self.transport.abort()  # closing would wait for the client
