"""Train, measure and sample GPT-2-class models; what is named here is imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt.checkpoint import load_checkpoint
    from nanogpt.generation import generate
    from nanogpt.model import GPT, GPTConfig
    from nanogpt.tokenizer import Tokenizer

__all__ = ["GPT", "GPTConfig", "Tokenizer", "__version__", "generate", "load_checkpoint"]
__version__ = "0.1.0"

_HOMES = {
    "GPT": "nanogpt.model",
    "GPTConfig": "nanogpt.model",
    "Tokenizer": "nanogpt.tokenizer",
    "generate": "nanogpt.generation",
    "load_checkpoint": "nanogpt.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
