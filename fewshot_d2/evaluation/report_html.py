"""Building blocks of the HTML report: text is escaped, pictures are embedded, nothing is linked."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --tint: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 1.2rem 1rem 4rem;
  color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .5rem 0; max-width: 75ch; }
.lead, figcaption, .note { color: var(--soft); }
.note, figcaption { font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th { background: var(--tint); font-weight: 600; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
td.hash { font: .78rem ui-monospace, Consolas, monospace; text-align: left;
  white-space: normal; word-break: break-all; min-width: 18rem; }
tr.baseline td { color: var(--soft); font-style: italic; }
tr.main td { font-weight: 600; }
.grid { display: grid; gap: 1.1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); }
.plots { display: grid; gap: 1.1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  overflow-x: auto; font: .8rem/1.45 ui-monospace, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.key { display: inline-block; width: 1.6em; height: .7em; border: 2px solid;
  margin: 0 .3em 0 .9em; }
@media print { h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole document; ``title`` and ``lead`` are text, ``sections`` HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    """A titled part; ``content`` is HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; ``kind`` is a CSS class."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    row_kinds: Sequence[str] = (),
    hash_column: int = -1,
) -> str:
    """A table of text; ``row_kinds`` are CSS classes, ``hash_column`` gets a small font."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for number, row in enumerate(rows):
        kind = f' class="{row_kinds[number]}"' if row_kinds and row_kinds[number] else ""
        cells = "".join(
            f"{'<td class=hash>' if i == hash_column else '<td>'}{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        lines.append(f"<tr{kind}>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(content: bytes, caption: str, *, kind: str = "png") -> str:
    """An embedded picture; ``kind`` is "png" or "jpeg"."""
    encoded = base64.b64encode(content).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/{kind};base64,{encoded}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def grid(pictures: Iterable[str], kind: str = "grid") -> str:
    """Pictures beside each other as the width allows; ``kind`` is "grid" or "plots"."""
    return f'<div class="{kind}">\n' + "\n".join(pictures) + "\n</div>"


def folded(title: str, content: str) -> str:
    """HTML that is shown on a click."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def code(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def facts(items: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items) + "</dl>"


def color_key(colors: Mapping[str, tuple[int, int, int]]) -> str:
    """Names with a frame in their RGB colour."""
    items = "".join(
        f'<span class="key" style="border-color:rgb{color}"></span>{escape(name)}'
        for name, color in colors.items()
    )
    return f'<p class="note">{items}</p>'
