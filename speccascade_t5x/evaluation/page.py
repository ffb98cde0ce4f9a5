"""Self-contained HTML: one file, no network, readable on a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

# Nothing may be fetched, whatever ends up in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light; --line: #d8dde3; --soft: #f4f6f8; --text: #1d2733; --mute: #5b6775; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--text); background: #fff;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .2rem 0 .6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p, li { max-width: 46rem; } a { color: #1b6ca8; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .82rem; width: 100%; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--soft); white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th:first-child { background: var(--soft); } tr:last-child td { border-bottom: 0; }
figure { margin: 1rem 0; } figure img { width: 100%; max-width: 52rem; height: auto; }
figcaption, .note { color: var(--mute); font-size: .85rem; }
details { margin: .6rem 0; } summary { cursor: pointer; padding: .3rem 0; font-weight: 600; }
.warn { border-left: 4px solid #c77d0a; padding: .2rem .8rem; background: #fff8ec; }
"""


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=True)


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole document."""
    run = f"<script>{script}</script>" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n'
        f"<body>\n{body}\n{run}</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bullets(items: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""


def picture(svg: Path, caption: str) -> str:
    """An SVG inside the page, kept apart from it, so that ids of two pictures cannot meet."""
    data = base64.b64encode(svg.read_bytes()).decode("ascii")
    said = escape(caption)
    return f'<figure><img alt="{said}" src="data:image/svg+xml;base64,{data}"><figcaption>{said}</figcaption></figure>'
