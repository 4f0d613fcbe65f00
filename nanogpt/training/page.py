"""An HTML page in one file: no script, nothing loaded, light and dark, desk, phone and paper."""

import html

from nanogpt.runs.log import visible


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
<style>{STYLE}</style>
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


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --code: #f3f5f8; --ink: #1b1f27; --muted: #5b6472;
  --line: #e1e5ea; --grid: #e8ebef; --accent: #1f5fd0;
  --series-0: #2563eb; --series-1: #d9480f; --reference: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --card: #171b21; --code: #11151a; --ink: #e6e9ee; --muted: #9aa4b2;
    --line: #2a313a; --grid: #272e37; --accent: #8ab4ff;
    --series-0: #74a9ff; --series-1: #ff9d5c; --reference: #98a2b0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 40px 0 12px; }
h3 { font-size: 13px; font-weight: 600; color: var(--muted); margin: 0 0 6px; }
small { color: var(--muted); font-size: 12.5px; font-weight: 400; }
.facts { margin: 4px 0 20px; color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; margin: 0; }
@media (max-width: 960px) { .tiles { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 560px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.tiles div, figure, details, .card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; min-width: 0;
}
.tiles div { padding: 12px 14px; }
dt { font-size: 12.5px; color: var(--muted); }
dd { margin: 2px 0 0; font-size: 21px; font-weight: 600; line-height: 1.25; }
dd.note { font-size: 12.5px; font-weight: 400; color: var(--muted); }
.pair {
  display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
}
figure { margin: 0; padding: 12px 12px 6px; }
.centred { display: grid; place-items: center; }
figcaption {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 16px;
  padding: 0 4px 6px;
}
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--muted); }
.legend b { color: var(--ink); font-weight: 600; }
.legend i {
  display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle;
}
.series-0 { background: var(--series-0); }
.series-1 { background: var(--series-1); }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
pre {
  margin: 0; padding: 12px 14px; max-height: 420px; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--code); border-radius: 8px;
}
section > pre { background: var(--card); border: 1px solid var(--line); }
details { margin-top: 14px; }
summary { padding: 10px 14px; cursor: pointer; color: var(--accent); }
details > pre, details > .card { margin: 0 14px 14px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 8px; }
.card { padding: 12px; overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td {
  text-align: left; vertical-align: top; padding: 5px 20px 5px 2px; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--line);
}
th { font-weight: 500; color: var(--muted); white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
.wide { min-width: 520px; }
.numbers th, .numbers td { text-align: right; padding: 4px 2px 4px 12px; }
.numbers th { white-space: normal; overflow-wrap: normal; }
.numbers td { white-space: nowrap; }
details .card { border: 0; padding: 0; }
@media print {
  body { background: none; }
  figure, .card { break-inside: avoid; }
  pre { max-height: none; }
}
"""
