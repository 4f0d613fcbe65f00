"""Start an engine's process.

    python -m serving.engine unix:/tmp/engine.sock '{"models": "runs"}'

Its kernels compile, where they have to, while torch is imported.
"""

import json
import os
import sys

from serving.engine import compiling
from serving.engine.messages import Settings
from serving.logs import configure


def main(address: str, settings: Settings) -> None:
    """Run an engine until it is told to end; standard output carries its heartbeats alone."""
    pulse = os.dup(1)
    os.dup2(2, 1)
    configure()
    if settings.device in ("auto", "cpu"):
        compiling.begin()
    from serving.engine.server import run

    run(address, settings, pulse)


if __name__ == "__main__":
    main(sys.argv[1], Settings(**json.loads(sys.argv[2])))
