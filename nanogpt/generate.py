"""Stream a completion from a checkpoint.

    python -m nanogpt.generate CHECKPOINT --prompt "def main(" --max-new-tokens 100

CHECKPOINT is a .ckpt, a run directory, or the name of a run under runs/. For an instruction-tuned
model (stage=instruct) the prompt is a user's message, and only the reply is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from nanogpt.checkpoint import load_checkpoint
from nanogpt.command import make_parser, parse, run_command
from nanogpt.generation import Reply
from nanogpt.prompts import find_template
from nanogpt.text import print_line

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse(parser(), arguments)
    return run_command("nanogpt.generate", partial(write, options))


def write(options: argparse.Namespace) -> None:
    """Write the completion, or the reply to the prompt, token by token."""
    checkpoint = load_checkpoint(
        options.checkpoint,
        device=options.device,
        runs_dir=options.runs_dir,
        allow_modules=options.allow_module,
    )
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    name = None if options.raw else checkpoint.template
    template = None if name is None else find_template(name)
    reply = Reply(
        checkpoint.model,
        checkpoint.tokenizer,
        prompt,
        template,
        **{name: getattr(options, name) for name in SAMPLING},
    )
    if template is None:
        _write(prompt)
    for text in reply:
        _write(text)
    _write("\n")


def _write(text: str) -> None:
    """Write and flush text; a terminal gets no control characters."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    print_line(text, end="", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    shared = ("checkpoint", "--device", "--allow-module", "--runs-dir")
    what = "Stream a completion from a checkpoint."
    parser = make_parser("nanogpt.generate", what, *shared)
    parser.add_argument(
        "--prompt",
        default="",
        help="the text to continue (default: begin a document); - reads standard input",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as text, without the template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample among the likeliest tokens that sum to p"
    )
    parser.add_argument("--min-p", type=float, help="drop tokens below p times the likeliest")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
