"""A report as one self-contained HTML file: its images are embedded, and it has no scripts."""

import base64
from collections.abc import Sequence
from html import escape
from string import Template
from typing import NamedTuple

__all__ = ["Drawing", "Section", "page"]

MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml"}


class Drawing(NamedTuple):
    """A figure as a file: its name without the suffix, its caption, and its content."""

    name: str
    text: str
    content: bytes


class Section(NamedTuple):
    """A section of the report: a table, whose first row is its header, and captioned figures."""

    title: str
    text: str
    table: Sequence[Sequence[str]]
    drawings: Sequence[Drawing]


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --soft: #57606a;
  --line: #d0d7de; --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --ink: #e6edf3; --soft: #9da7b3; --line: #30363d; --link: #58a6ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; columns: 16rem; }
p, figcaption { color: var(--soft); max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1.25rem 0; }
figcaption { margin-top: 0.4rem; }
/* The pictures have a white ground, in the dark too. */
img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
/* On a phone they would be too small to read: they scroll instead. */
@media (max-width: 40rem) { img { max-width: 44rem; } }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$text</p>
</header>
<nav aria-label="Sections"><ul>
$contents
</ul></nav>
<main>
$sections
</main>
</body>
</html>
""")


def page(title: str, text: str, sections: Sequence[Section], file_format: str) -> str:
    """Return the report as HTML.

    Args:
        title: The title of the report.
        text: The paragraph below the title.
        sections: The sections in order; links to them precede the first one.
        file_format: The format of the drawings, a key of `MEDIA_TYPES`.
    """
    contents = "\n".join(
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(sections)
    )
    return PAGE.substitute(
        title=escape(title),
        text=escape(text),
        contents=contents,
        sections="\n".join(
            _section(number, section, file_format) for number, section in enumerate(sections)
        ),
    )


def _section(number: int, section: Section, file_format: str) -> str:
    parts = [f'<section id="section-{number}">', f"<h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    if section.table:
        parts.append(_table(section.title, section.table))
    parts += [_figure(drawing, file_format) for drawing in section.drawings]
    return "\n".join([*parts, "</section>"])


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    table = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"{_scrolling(f'Table of {title}')}<table>\n{table}\n</table></div>"


def _figure(drawing: Drawing, file_format: str) -> str:
    data = base64.b64encode(drawing.content).decode()
    source = f"data:{MEDIA_TYPES[file_format]};base64,{data}"
    text = escape(drawing.text)
    return (
        f'<figure>{_scrolling(text)}<img alt="{text}" src="{source}"></div>\n'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _scrolling(label: str) -> str:
    """Return the opening tag of a region that scrolls sideways, with the keyboard as well."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
