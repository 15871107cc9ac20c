"""One HTML page that holds everything it shows: no network, no script, light and dark, for print.

A ``Report`` is plain data; ``render`` turns it into the page. The same report gives the same
bytes. All text is escaped; the only markup taken over as it is are the plots of ``plots``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path

from blindtune.atomic import atomic_file

LAYER_KINDS = {
    "adapter": "adapter, trained",
    "raw": "kept as it is",
    "compressed": "kept, rank-compressed",
    "harmonizer": "replaced by a harmonizer",
}
"""The kinds of layers in an emulator, and how the legend names them."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy of the page: the browser itself refuses to load or run anything."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows; the first column names the row, the others are right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    emphasis: str = ""
    """Name (first cell) of the row to stress."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing made by ``plots``."""

    svg: str
    """Trusted markup, taken over as it is."""
    caption: str = ""
    wide: bool = False
    """Scrolls sideways on a phone instead of shrinking."""


@dataclass(frozen=True, kw_only=True)
class LayerStrip:
    """The layers of a model from bottom to top, each a key of ``LAYER_KINDS``."""

    kinds: Sequence[str]
    caption: str = ""

    def __post_init__(self) -> None:
        """Unknown kinds are a mistake of the caller."""
        assert set(self.kinds) <= LAYER_KINDS.keys(), f"unknown kinds of layers: {self.kinds}"


@dataclass(frozen=True, kw_only=True)
class Words:
    """Names with the sentences that belong to each."""

    items: Sequence[tuple[str, Sequence[str]]]
    emphasis: str = ""
    """The name to stress."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, sentences, then tables and plots, then notes in small print."""

    title: str
    text: Sequence[str] = ()
    blocks: Sequence[Table | Plot | LayerStrip | Words] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page."""

    title: str
    subtitle: str = ""
    summary: Sequence[str] = ()
    """Sentences that say what came out."""
    numbers: Sequence[tuple[str, str]] = ()
    """The two to four figures that matter, as (figure, what it is)."""
    sections: Sequence[Section] = ()
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Title -> name -> value: options, seeds, versions; folded away at the end."""


def write(report: Report, path: str | Path) -> None:
    """Render a report into a file, replacing what is there.

    Raises:
        OutputError: the file cannot be written.
    """
    page = render(report)
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8", newline="\n")


def render(report: Report) -> str:
    """The page as HTML."""
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(report.title)}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        "<main>",
        "<header>",
        f"<h1>{escape(report.title)}</h1>",
        _paragraphs([report.subtitle] if report.subtitle else [], "subtitle"),
        _paragraphs([" ".join(report.summary)] if report.summary else [], "summary"),
        _numbers(report.numbers),
        "</header>",
        *(_section(section) for section in report.sections),
        _facts(report.facts),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    parts = [
        "<section>",
        f"<h2>{escape(section.title)}</h2>",
        _paragraphs(section.text),
        *(_block(block) for block in section.blocks),
        _paragraphs(section.notes, "note"),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _block(block: Table | Plot | LayerStrip | Words) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, LayerStrip):
        return _strip(block)
    if isinstance(block, Words):
        return _words(block)
    drawing = f'<div class="wide">{block.svg}</div>' if block.wide else block.svg
    return f"<figure>\n{drawing}\n{_caption(block.caption)}</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    lines = ['<div class="scroll"><table>']
    if table.caption:
        lines.append(f"<caption>{escape(table.caption)}</caption>")
    lines += [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for name, *cells in table.rows:
        stress = ' class="emphasis"' if table.emphasis and name == table.emphasis else ""
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr{stress}><th scope="row">{escape(name)}</th>{data}</tr>')
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _strip(strip: LayerStrip) -> str:
    cells = "".join(
        f'<i class="{kind}" title="layer {index}: {LAYER_KINDS[kind]}"></i>'
        for index, kind in enumerate(strip.kinds)
    )
    counts = {kind: list(strip.kinds).count(kind) for kind in LAYER_KINDS}
    legend = "".join(
        f'<li><i class="{kind}"></i>{count} {LAYER_KINDS[kind]}</li>'
        for kind, count in counts.items()
        if count
    )
    words = ", ".join(f"{count} {LAYER_KINDS[kind]}" for kind, count in counts.items() if count)
    return (
        f'<figure>\n<div class="strip" role="img" aria-label="{len(strip.kinds)} layers: {words}">'
        f'{cells}</div>\n<div class="ends"><span>input</span><span>output</span></div>\n'
        f'<ul class="legend">{legend}</ul>\n{_caption(strip.caption)}</figure>'
    )


def _words(words: Words) -> str:
    lines = ['<dl class="words">']
    for name, sentences in words.items:
        stress = ' class="emphasis"' if words.emphasis and name == words.emphasis else ""
        said = "".join(f"<dd>{escape(sentence)}</dd>" for sentence in sentences)
        lines.append(f"<dt{stress}>{escape(name)}</dt>{said}")
    return "\n".join([*lines, "</dl>"])


def _numbers(numbers: Sequence[tuple[str, str]]) -> str:
    if not numbers:
        return ""
    cells = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(figure)}</dd></div>" for figure, what in numbers
    )
    return f'<dl class="numbers">{cells}</dl>'


def _facts(facts: Mapping[str, Mapping[str, object]]) -> str:
    if not facts:
        return ""
    lines = ["<details>", "<summary>How this was made</summary>"]
    for title, values in facts.items():
        pairs = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
            for name, value in values.items()
        )
        lines.append(f'<h3>{escape(title)}</h3>\n<dl class="facts">{pairs}</dl>')
    return "\n".join([*lines, "</details>"])


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>\n" if text else ""


def _paragraphs(texts: Sequence[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return "\n".join(f"<p{attribute}>{escape(text)}</p>" for text in texts)
