"""Plots outside of a report: an SVG file that carries the report's colours, light and dark."""

from __future__ import annotations

import re
from importlib.resources import files

from blindtune.evaluation.pages.report import Plot

FONT = 'font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'


def standalone(plot: Plot) -> str:
    """The plot as the text of an SVG file.

    A viewer that shows it as an image follows the reader's light or dark setting, as the report
    does; the colours are read from report.css, so the two never differ.
    """
    css = (files("blindtune.evaluation.pages") / "report.css").read_text()
    light = re.search(r":root \{[^}]*\}", css)
    dark = re.search(r"@media \(prefers-color-scheme: dark\) \{\s*:root \{[^}]*\}\s*\}", css)
    box = re.search(r'viewBox="[\d.-]+ [\d.-]+ ([\d.]+) ([\d.]+)"', plot.svg)
    assert light is not None
    assert dark is not None
    assert box is not None
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{box[1]}" height="{box[2]}" '
        f"style='background: var(--paper); {FONT}'"
    )
    style = f"<style>{light[0]} {dark[0]}</style>"
    head, _, rest = plot.svg.partition(">")
    return f"{opening}{head.removeprefix('<svg')}>{style}{rest}\n"
