"""A document as a list of blocks, and the two forms it is written in: Markdown and HTML.

Text is plain text: what either form would take for its own marks is escaped. A cell or a piece of
a sentence is a str, a `Code`, a `Link` to a heading, or a `Badge`.
"""

from __future__ import annotations

import base64
import os
import re
from html import escape
from pathlib import Path
from typing import NamedTuple


class Code(NamedTuple):
    """Words of a program inside a sentence or a cell."""

    text: str


class Link(NamedTuple):
    """A word that leads to the heading of the same document that reads as it does."""

    text: str


class Badge(NamedTuple):
    """A word that is seen at once; `colour` is "good", "middling" or "bad"."""

    text: str
    colour: str


class Heading(NamedTuple):
    level: int
    text: str


class Paragraph(NamedTuple):
    pieces: tuple


class Listing(NamedTuple):
    """Lines of a terminal, as they are."""

    text: str


class Table(NamedTuple):
    header: tuple
    rows: list


class Figure(NamedTuple):
    path: Path
    caption: str


def slug(text: str) -> str:
    """The anchor that GitHub gives to a heading.

    >>> slug("Where we differ: mnist_small")
    'where-we-differ-mnist_small'
    """
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def markdown(blocks: list, directory) -> str:
    """Markdown as GitHub reads it; figures are linked relative to `directory`."""
    return "\n\n".join(_markdown_block(b, Path(directory)) for b in blocks) + "\n"


def _markdown_block(block, directory):
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_markdown(text)}"
        case Paragraph(pieces):
            return "".join(map(_markdown, pieces))
        case Listing(text):
            return f"```text\n{text}\n```"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            cells = [
                [c if c == "---" else _markdown(c).replace("|", "\\|") for c in r] for r in lines
            ]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)
        case Figure(path, caption):
            link = Path(os.path.relpath(path, directory)).as_posix().replace(" ", "%20")
            return f"![{_markdown(caption)}]({link})"
    raise TypeError(f"no block of a document: {block!r}")


def _markdown(piece):
    match piece:
        case Code(text):
            return f"`{text}`"
        case Link(text):
            return f"[{_markdown(text)}](#{slug(text)})"
        case Badge(text, _):
            return f"**{_markdown(text)}**"
    text = re.sub(r"([\\`*~<])", r"\\\1", piece)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word it is none of Markdown's


def html(blocks: list, title: str) -> str:
    """One page that needs nothing beside it: the figures are in it."""
    body = "\n".join(map(_html_block, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html_block(block):
    match block:
        case Heading(level, text):
            return f'<h{level} id="{slug(text)}">{_html(text)}</h{level}>'
        case Paragraph(pieces):
            return f"<p>{''.join(map(_html, pieces))}</p>"
        case Listing(text):
            return f"<pre>{escape(text)}</pre>"
        case Table(header, rows):
            head = "".join(f"<th>{_html(c)}</th>" for c in header)
            body = "\n".join(
                f"<tr>{''.join(f'<td>{_html(c)}</td>' for c in row)}</tr>" for row in rows
            )
            return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
        case Figure(path, caption):
            image = base64.b64encode(Path(path).read_bytes()).decode()
            return (
                f'<figure><img src="data:image/png;base64,{image}" alt="{escape(caption)}">'
                f"<figcaption>{_html(caption)}</figcaption></figure>"
            )
    raise TypeError(f"no block of a document: {block!r}")


def _html(piece):
    match piece:
        case Code(text):
            return f"<code>{escape(text)}</code>"
        case Link(text):
            return f'<a href="#{slug(text)}">{escape(text)}</a>'
        case Badge(text, colour):
            return f'<span class="badge {colour}">{escape(text)}</span>'
    return escape(piece)


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f6f3; color: #23272b;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 2.5rem 5rem; background: #fff; }
h1 { font-size: 1.9rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; margin: 3.2rem 0 0.8rem; padding-top: 1.2rem;
  border-top: 1px solid #dcdcd6; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 0.5rem; }
p { max-width: 46rem; }
a { color: #2a6fbb; text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.84em; }
code { background: #f1f1ec; padding: 0.1em 0.3em; border-radius: 3px; overflow-wrap: anywhere; }
pre { background: #f6f6f3; padding: 0.9rem 1.1rem; border-radius: 6px; overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { text-align: left; vertical-align: top; padding: 0.45rem 0.9rem 0.45rem 0;
  border-bottom: 1px solid #e6e6e0; }
th { font-weight: 600; color: #565c62; white-space: nowrap; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #565c62; font-size: 0.9rem; }
.badge { display: inline-block; padding: 0.05rem 0.55rem; border-radius: 1rem;
  white-space: nowrap; font-size: 0.85rem; font-weight: 600; }
.good { background: #dcefe0; color: #1d6b35; }
.middling { background: #faeccb; color: #805800; }
.bad { background: #f8dcd6; color: #98301b; }
"""
