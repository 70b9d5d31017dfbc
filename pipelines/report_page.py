"""A stage's report.html: one page that carries its pictures, style and script, and loads nothing from anywhere."""

import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_page(file: Path, title: str, sections: Mapping[str, str], style: str = "", script: str = "") -> None:
    """Write the page of `sections`, heading -> HTML. Headings are escaped here, what is in the HTML by who made it."""
    body = "".join(f"<h2>{html.escape(name)}</h2>{content}" for name, content in sections.items() if content)
    parts = {"TITLE": html.escape(title), "STYLE": style, "BODY": body, "SCRIPT": script}
    # In one go: a document may well contain the word BODY.
    file.write_text(re.sub("|".join(parts), lambda found: parts[found[0]], _PAGE), encoding="utf-8")


def pairs(items: Iterable[tuple[Any, Any]]) -> str:
    """A table of names and values."""
    return _table(_row(item) for item in items)


def grid(heads: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a line of heads; a row's first cell is its name."""
    line = "".join(f"<th>{html.escape(str(head))}</th>" for head in heads)
    return _table([f"<tr>{line}</tr>", *map(_row, rows)])


@contextmanager
def drawing() -> Iterator[Any]:
    """pyplot, set up to draw for a page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text stays text, as the browser's fonts have Chinese, and a "$" in it begins no formula.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False}):
        yield plt


def as_svg(figure: Any) -> str:
    """The figure as an element of the page."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", picture.getvalue(), count=1, flags=re.DOTALL)


def _row(cells: Sequence[Any]) -> str:
    name, *values = (html.escape(str(cell)) for cell in cells)
    return f"<tr><th>{name}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"


def _table(rows: Iterable[str]) -> str:
    return f"<table>{''.join(rows)}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>TITLE</title><style>
body { font: 15px/1.6 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; max-width: 1200px;
  margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } tr > * { text-align: left; padding: .2em .8em;
  border-bottom: 1px solid #ddd; font-weight: normal; vertical-align: top; } td { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em; } pre i { color: #777; }
summary { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; cursor: pointer; }
mark { background: #ffe58a; } svg { max-width: 100%; height: auto; }
STYLE</style></head><body><h1>TITLE</h1>
BODY
<script>SCRIPT</script></body></html>
"""
