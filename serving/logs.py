"""Logs of the server's processes: one line of JSON for each event, on standard error."""

import atexit
import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

from nanogpt.command import flush_output


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; `extra={"fields": {...}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Handler(logging.StreamHandler):
    """A handler of standard error, which leads to the null device once it cannot be written.

    Else what it holds back would let the next start of a process fail, which flushes it.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        flush_output()
        super().handleError(record)


def of_request(request_id: str) -> dict[str, dict[str, str]]:
    """Return a log line's `extra` with the id of the request that it is about."""
    return {"fields": {"request_id": request_id}}


def configure() -> None:
    """Send all logging of this process to standard error as JSON; output errors end nothing."""
    atexit.register(flush_output)
    handler = Handler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "sse_starlette", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
