"""Start an engine's process.

    python -m serving.engine unix:/tmp/engine.sock '{"models": "runs"}'

Its kernels compile, where they have to, while torch is imported.
"""

import asyncio
import signal
import sys

from serving.engine import compiling
from serving.engine.messages import Settings
from serving.logs import configure


def main(address: str, settings: Settings) -> None:
    """Run an engine until it has drained; an engine that listens is ready."""
    configure()
    if settings.device in ("auto", "cpu"):
        compiling.compiled_kernels()
    import torch

    from serving.engine.server import Server

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        asyncio.run(Server(settings, address).serve())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has ended as requested


if __name__ == "__main__":
    main(sys.argv[1], Settings.model_validate_json(sys.argv[2]))
