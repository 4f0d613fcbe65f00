"""An HTML page in one file: no script, nothing loaded, light and dark, desk, phone and paper."""

import html
from pathlib import Path

from nanogpt.runs.log import visible

STYLE = Path(__file__).parent / "report.css"


def document(title: str, body: str) -> str:
    """Return a whole page; its own policy forbids all but the pictures and the style inside it."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def section(title: str, body: str, note: str = "") -> str:
    """Return a titled section; title, note and body are HTML."""
    return f"<section>\n<h2>{title} <small>{note}</small></h2>\n{body}\n</section>"


def details(title: str, body: str) -> str:
    """Return HTML folded under a line of text."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def pre(text: str, label: str) -> str:
    """Return text as it is in a box that scrolls where it is long, by keyboard too."""
    return f'<pre tabindex="0" role="region" aria-label="{escape(label)}">{escape(text)}</pre>'


def escape(value: object) -> str:
    """Return text that is safe between tags and inside attributes, control characters visible."""
    return html.escape(visible(str(value)))
