"""Serve trained checkpoints: the OpenAI API and a web page.

    python serve.py                             every run under runs/, on port 5001
    python serve.py checkpoint=RUN dtype=int8   one checkpoint, run or directory of runs
    python serve.py host=0.0.0.0 workers=2      with NANOGPT_API_KEYS set

Every key is in conf/serve.yaml, with a comment.
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and main() says it in one sentence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanogpt.command import guard_output
from nanogpt.config import CONF, as_overrides, expand_environment, explain_composition
from serving import environment
from serving.api.settings import ApiSettings, Binding
from serving.engine.messages import Settings

ROOT = Path(__file__).parent
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
SETTINGS = (Binding, ApiSettings, Settings)

composed: list[dict[str, Any]] = []


def main(arguments: Sequence[str]) -> int:
    """Compose the configuration and become the server; return the exit code where that fails."""
    guard_output()
    expand_environment()
    sys.argv[1:] = as_overrides(arguments)
    try:
        environment.check_names(os.environ, *SETTINGS)
        compose()
        for config in composed:  # none for --help and --cfg
            become_server(config)
    except KeyboardInterrupt:
        return INTERRUPTED
    except FileNotFoundError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return FAILED
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        text = explain_composition(error, "serve")
        text = re.sub(r"NANOGPT_(\w+)=", lambda name: f"{name[1].lower()}=", text)
        print(f"serve.py: {text}", file=sys.stderr)
        return WRONG_USAGE
    return 0


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="serve")
def compose(cfg: DictConfig) -> None:
    """Keep the composed configuration; Hydra words what fails in here in its own way."""
    typed = {
        override.lstrip("+").partition("=")[0] for override in HydraConfig.get().overrides.task
    }
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    composed.append(config | from_environment(config.keys() - typed))


def from_environment(keys: Iterable[str]) -> dict[str, str]:
    """Return the text of each key's environment variable that is set: `NANOGPT_PORT` is `port`."""
    variables = {key: environment.variable(key) for key in keys}
    return {key: os.environ[name] for key, name in variables.items() if name in os.environ}


def become_server(config: Mapping[str, Any]) -> None:
    """Replace this process by the server, which has no use for Hydra."""
    variables = to_variables(config)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.stdout.flush()
    os.execve(
        sys.executable,
        [sys.executable, "-m", "serving"],
        {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)},
    )


def to_variables(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the configuration as the environment that `python -m serving` reads.

    Raises ValueError for a value of the wrong kind, FileNotFoundError where no models are.
    """
    texts = {key: _text(value) for key, value in config.items()}
    texts["models"] = str(find_models(config["checkpoint"], config["runs_dir"]))
    variables = {f"{environment.PREFIX}{key.upper()}": text for key, text in texts.items()}
    for kind in SETTINGS:
        environment.read(kind, variables)
    return variables


def find_models(checkpoint: str | None, runs_dir: str) -> Path:
    """Return the file or directory with the models: a checkpoint, a run by name, or all runs."""
    if checkpoint is None:
        if Path(runs_dir).is_dir():
            return Path(runs_dir)
        raise FileNotFoundError(
            f"there are no runs at {runs_dir}; python train.py makes one, or pass checkpoint=PATH"
        )
    for path in (Path(checkpoint), Path(runs_dir) / checkpoint):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"there is no checkpoint {checkpoint!r}: neither a file, nor a run directory, "
        f"nor a run under {runs_dir}; pass one of these"
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
