"""Serve trained checkpoints: the OpenAI API and a web page.

    python serve.py                             every run under runs/, on port 5001
    python serve.py checkpoint=RUN dtype=int8   one checkpoint, run, Hugging Face directory, ...
    python serve.py host=0.0.0.0 workers=2      with NANOGPT_API_KEYS set

Every key is in conf/serve.yaml, with a comment.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and main() prints one sentence

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from nanogpt.config import CONF, run_hydra
from nanogpt.runs.directory import find_path
from serving.api.settings import ApiSettings, read_settings, variable

ROOT = Path(__file__).parent

composed: list[dict[str, Any]] = []


def main(arguments: Sequence[str]) -> int:
    """Compose the configuration and become the server; return the exit code where that fails."""

    def work() -> None:
        compose()
        for values in composed:  # none for --help and --cfg
            settings = read_settings(**values)
            check_models(settings)
            become_server(settings)

    return run_hydra("serve", arguments, work)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="serve")
def compose(cfg: DictConfig) -> None:
    """Collect the composed values; Hydra would word what fails in here in its own way."""
    composed.append(chosen(cfg, HydraConfig.get().overrides.task))


def chosen(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of a configuration, without those that the environment sets.

    A key that is typed counts more than its variable.
    """
    typed = {override.lstrip("+").partition("=")[0] for override in overrides}
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return {k: v for k, v in config.items() if k in typed or variable(k) not in os.environ}


def check_models(settings: ApiSettings) -> None:
    """Raise FileNotFoundError where there is no checkpoint of the name, or no directory of runs.

    Raises ValueError for a file, or a Hugging Face model, that cannot be loaded.
    """
    if settings.checkpoint is not None:
        path = find_path(settings.checkpoint, settings.runs_dir)
        if path.is_file() or (path / "config.json").is_file():
            from nanogpt.checkpoint import load_checkpoint

            sys.path.append(os.getcwd())  # for allowed modules, as in the engine
            load_checkpoint(path, device="meta", allow_modules=settings.allow_modules)
    elif not Path(settings.runs_dir).is_dir():
        raise FileNotFoundError(
            f"there are no runs at {settings.runs_dir}; "
            "python train.py makes one, or pass checkpoint=PATH"
        )


def become_server(settings: ApiSettings) -> None:
    """Replace this process by the server, which has no use for Hydra."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **settings.variables(), "PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "serving"], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
