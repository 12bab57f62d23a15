"""One HTML file that asks nothing of any other host."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from v4jax.files.atomic import write_atomically
from v4jax.files.writing import writing

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; font-family: monospace; white-space: pre-wrap; }
img { max-width: 100%; background: white; }
"""


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Writes the page; empty parts are left out."""
    body = "\n".join(part for part in parts if part)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    with writing(path):
        write_atomically(path, page.encode(errors="replace"))


def listed(lines: Iterable[str]) -> str:
    """Lines of text as a list."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def embedded(image: bytes | None, note: str | None) -> str:
    """A PNG within the page, or why there is none."""
    if image is None:
        return f"<p>{html.escape(note)}</p>" if note else ""
    data = base64.b64encode(image).decode()
    return f'<img alt="Pictures of the results" src="data:image/png;base64,{data}">'


def html_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{html.escape(each)}</th>" for each in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
