"""A document as a list of blocks, and the two forms it is written in: Markdown and HTML.

Text is plain text: what either form would take for its own marks is escaped. A cell or a piece of
a sentence is a str, a `Code`, a `Link` to a heading, or a `Badge`. The page is one file: figures
are in it, and it runs no script.
"""

from __future__ import annotations

import base64
import os
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

from tf_gsnr.report.style_sheet import STYLE

CARDS_BEYOND = 3  # columns that a phone has room for: a wider table is a card per row there


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


class Index(NamedTuple):
    """What the document holds: pairs of a `Link` and what there is to say of it, in few words."""

    entries: list


class Points(NamedTuple):
    """A list, each point of which is a tuple of pieces."""

    points: list


class Folded(NamedTuple):
    """A table that few readers want: on the page it opens by a click on its title."""

    title: str
    table: Table


class Figure(NamedTuple):
    """A drawing: `svg` is the text of one, `png` a file of the same, which Markdown needs."""

    svg: str
    caption: str
    png: Path | None = None


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
            return _markdown_line(pieces)
        case Points(points):
            return "\n".join(f"- {_markdown_line(pieces)}" for pieces in points)
        case Index(entries):
            return "\n".join(f"- {_markdown(link)}: {_markdown(text)}" for link, text in entries)
        case Folded(title, table):
            return f"### {_markdown(title)}\n\n{_markdown_block(table, directory)}"
        case Listing(text):
            return f"```text\n{text}\n```"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            cells = [
                [c if c == "---" else _markdown(c).replace("|", "\\|") for c in r] for r in lines
            ]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)
        case Figure(_, caption, png):
            if png is None:
                raise ValueError(
                    f"Markdown shows a figure from a file; of {caption!r} there is none"
                )
            link = Path(os.path.relpath(png, directory)).as_posix().replace(" ", "%20")
            return f"![{_markdown(caption)}]({link})"
    raise TypeError(f"no block of a document: {block!r}")


def _markdown_line(pieces):
    return "".join(map(_markdown, pieces))


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
            return f"<p>{_html_line(pieces)}</p>"
        case Points(points):
            return _html_list(map(_html_line, points), ' class="points"')
        case Index(entries):
            lines = (f"{_html(link)} <small>{_html(text)}</small>" for link, text in entries)
            return f'<nav class="index" aria-label="Contents">{_html_list(lines)}</nav>'
        case Folded(title, table):
            summary = f'<summary id="{slug(title)}">{_html(title)}</summary>'
            return f"<details>\n{summary}\n{_html_table(table)}\n</details>"
        case Listing(text):
            return f"<pre>{escape(text)}</pre>"
        case Table():
            return _html_table(block)
        case Figure(svg, caption):
            image = base64.b64encode(svg.encode()).decode()
            return (
                f'<figure style="--width: {_width(svg):.0f}px"><div class="plate">'
                f'<img src="data:image/svg+xml;base64,{image}" alt="{escape(caption)}"></div>'
                f"<figcaption>{_html(caption)}</figcaption></figure>"
            )
    raise TypeError(f"no block of a document: {block!r}")


def _html_line(pieces):
    return "".join(map(_html, pieces))


def _html_list(lines, attributes=""):
    points = "\n".join(f"<li>{line}</li>" for line in lines)
    return f"<ul{attributes}>\n{points}\n</ul>"


def _html_table(table):
    """A cell knows its column's name, which stands before it where a narrow window has cards."""
    head = "".join(f'<th scope="col">{_html(name)}</th>' for name in table.header)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(name)}">{_html(cell)}</td>'
            for name, cell in zip(table.header, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    kind = ' class="stacked"' if len(table.header) > CARDS_BEYOND else ""
    return (
        f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _width(svg):
    """The width of a drawing on a screen, in pixels, of which an inch has 96.

    >>> _width('<svg width="72pt" height="36pt">')
    96.0
    """
    found = re.search(r'<svg [^>]*?width="([\d.]+)pt"', svg, re.S)
    return float(found[1]) * 96 / 72 if found else 640.0


def _html(piece):
    match piece:
        case Code(text):
            words = " ".join(f"<span>{escape(word)}</span>" for word in text.split(" "))
            return f"<code>{words}</code>"
        case Link(text):
            return f'<a href="#{slug(text)}">{escape(text)}</a>'
        case Badge(text, colour):
            return f'<span class="badge {colour}">{escape(text)}</span>'
    return escape(piece)
