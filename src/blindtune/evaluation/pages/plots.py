"""Plots for the report: inline SVG with text kept as text and colours of the page.

Drawn by matplotlib in stand-in colours, which are then replaced by the page's CSS variables, so
that a plot follows light, dark and print like the text around it.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from blindtune.errors import ConfigError
from blindtune.evaluation.pages.report import Plot
from blindtune.evaluation.utility.scoreboard import (
    FIVE_ROWS,
    PLUG_IN,
    ZS,
    Scoreboard,
    as_perplexity,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, MID, LINE, ACCENT, PAPER = (
    "#010203",
    "#040506",
    "#070809",
    "#0a0b0c",
    "#0d0e0f",
    "#101112",
)
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    MID: "var(--mid)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    PAPER: "var(--paper)",
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MID,
    "ytick.color": MID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

Points = Sequence[tuple[float, float]]
NAME_SIDES = {"left": 6, "right": -6, "center": 0}
"""Where a name may be aligned to its point, and how far beside it."""


def five_rows(board: Scoreboard, *, caption: str = "") -> Plot:
    """Every row of a scoreboard as a dot, with its value and its spread over runs.

    Perplexity stands on a logarithmic axis.
    """
    nats = board.measure == "nats"
    names = list(board.rows)

    def scale(value: float) -> float:
        return as_perplexity(value) if nats else 100 * value

    def draw(axes: Axes) -> None:
        values = [scale(board.spread(name).mean) for name in names]
        if nats:
            axes.set_xscale("log")
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            row = board.spread(name)
            colour = ACCENT if name == PLUG_IN else INK if name in FIVE_ROWS else MUTED
            axes.axhline(place, color=LINE, linewidth=0.8, zorder=0)
            if row.deviation:
                ends = [scale(max(0.0, row.mean + s * row.deviation)) for s in (-1, 1)]
                axes.plot(ends, [place, place], color=colour, linewidth=2.2, alpha=0.5)
            axes.plot([value], [place], "o", color=colour, markersize=6.5)
            weight = "bold" if name == PLUG_IN else "normal"
            axes.annotate(
                f"{value:,.1f}",
                (value, place),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color=colour,
                weight=weight,
            )
        if ZS in board.rows:
            start = scale(board.spread(ZS).mean)
            ends_at = [names.index(ZS), len(names) - 0.4]
            axes.plot([start] * 2, ends_at, color=MID, linewidth=0.8, dashes=(2, 3), zorder=0.5)
        low, high = min(values), max(values)
        room = (high / low) ** 0.12 if nats else 0.12 * (high - low)
        room = max(room, 1.08) if nats else max(room, 1.0)
        axes.set_xlim((low / room, high * room) if nats else (low - room, high + room))
        axes.set_ylim(len(names) - 0.4, -0.8)
        axes.set_yticks(range(len(names)), names, color=INK)
        axes.tick_params(axis="y", length=0, pad=8)
        axes.spines["left"].set_visible(False)
        if nats:
            _plain_log_ticks(axes, low / room, high * room)
        axes.set_xlabel(
            "perplexity (log scale), lower is better" if nats else "accuracy, %, higher is better"
        )

    summary = ", ".join(f"{name} {scale(board.spread(name).mean):.1f}" for name in names)
    return Plot(
        svg=_svg(draw, size=(5.2, 0.75 + 0.42 * len(names)), title=summary), caption=caption
    )


def curves(
    lines: Mapping[str, Points],
    *,
    stressed: str = "",
    xlabel: str = "step",
    ylabel: str = "nats per token",
    caption: str = "",
) -> Plot:
    """Lines over steps; the stressed one in the accent colour, its lowest point marked."""

    def draw(axes: Axes) -> None:
        dashes = iter(("solid", (0, (5, 2)), (0, (1, 1.5)), "dashdot"))
        for name, points in lines.items():
            xs, ys = [x for x, _ in points], [y for _, y in points]
            if name == stressed:
                axes.plot(xs, ys, color=ACCENT, linewidth=2, label=name, zorder=3)
                best = min(range(len(ys)), key=ys.__getitem__)
                axes.plot(xs[best], ys[best], "o", color=ACCENT, markersize=5.5, zorder=4)
                axes.annotate(
                    f"{ys[best]:.2f}",
                    (xs[best], ys[best]),
                    xytext=(0, -14),
                    textcoords="offset points",
                    ha="center",
                    color=ACCENT,
                    weight="bold",
                    bbox={"facecolor": PAPER, "linewidth": 0, "pad": 1.5, "alpha": 0.85},
                )
            else:
                style = next(dashes, "solid")
                axes.plot(xs, ys, color=MUTED, linewidth=0.9, linestyle=style, label=name)
        axes.margins(x=0.02, y=0.14)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _whole_ticks(axes)
        _grid_lines(axes)
        axes.legend(frameon=False, loc="upper right", labelcolor=INK)

    title = f"{ylabel} over {xlabel}: {', '.join(lines)}"
    return Plot(svg=_svg(draw, size=(5.2, 2.8), title=title), caption=caption)


def importance(
    scores: Sequence[float],
    *,
    first_layer: int = 0,
    replaced: Sequence[int] = (),
    caption: str = "",
) -> Plot:
    """Importance score of each layer as a bar; replaced layers (by number) stay hollow."""

    def draw(axes: Axes) -> None:
        layers = range(first_layer, first_layer + len(scores))
        hollow = set(replaced)
        for layer, score in zip(layers, scores, strict=True):
            axes.bar(
                layer,
                score,
                width=0.72,
                facecolor="none" if layer in hollow else ACCENT,
                edgecolor=MUTED if layer in hollow else ACCENT,
                linewidth=0.9,
            )
        if any(score < 0 for score in scores):
            axes.axhline(0, color=MID, linewidth=0.8)
        axes.set_xlabel("layer")
        axes.set_ylabel("importance score")
        axes.margins(x=0.02)
        _whole_ticks(axes)
        _grid_lines(axes)
        axes.tick_params(axis="x", length=0)

    title = f"importance scores of {len(scores)} layers"
    return Plot(svg=_svg(draw, size=(5.2, 2.2), title=title), caption=caption)


def grid(
    panels: Mapping[str, Mapping[tuple[float, float], float]],
    *,
    measure: Literal["nats", "accuracy"] = "nats",
    beta: str = "beta",
    caption: str = "",
) -> Plot:
    """Quality over (alpha, beta): one heat map a panel, deeper colour is a better model.

    Args:
        panels: title (Plug-in, Emulator FT) -> (alpha, beta) -> nats per token or accuracy;
            points may be missing.
        measure: of the values; nats are shown as perplexity.
        beta: what the second number is called (a grid may be over the share of rank removed).
        caption: below the plot.
    """

    def draw_all(*all_axes: Axes) -> None:
        for axes, (name, values) in zip(all_axes, panels.items(), strict=True):
            _heat_map(axes, name, values, nats=measure == "nats")
        all_axes[0].set_ylabel(beta)

    rows = {row for values in panels.values() for _, row in values}
    unit = "perplexity" if measure == "nats" else "accuracy"
    return Plot(
        svg=_svg(
            draw_all,
            size=(5.2, 0.95 + 0.4 * len(rows)),
            title=f"{unit} over alpha and {beta}: {', '.join(panels)}",
            columns=len(panels),
        ),
        caption=caption,
        wide=True,
    )


def frontier(
    points: Mapping[str, tuple[float, float]],
    efficient: Sequence[str],
    *,
    chosen: str = "",
    lows: Mapping[str, tuple[float | None, float | None]] | None = None,
    wanted: tuple[float | None, float | None] = (None, None),
    bound: float | None = None,
    xlabel: str = "recovery of full fine-tuning's gain",
    ylabel: str = "gap (emulator FT less plug-in), nats a token",
    caption: str = "",
) -> Plot:
    """Utility to the right, privacy upwards: the efficient points joined, the others pale.

    Args:
        points: name -> (utility, privacy).
        efficient: names on the frontier.
        chosen: one name to stress.
        lows: lower ends of utility and privacy, by name; thin lines lead there.
        wanted: least utility and privacy, drawn as dotted lines.
        bound: the best utility there can be, a dashed line.
        xlabel, ylabel: of the axes.
        caption: below the plot.
    """

    def draw(axes: Axes) -> None:
        line = sorted(points[name] for name in efficient)
        axes.plot([x for x, _ in line], [y for _, y in line], color=ACCENT, linewidth=1.4)
        for name, (x, y) in points.items():
            on = name in efficient
            axes.plot([x], [y], "o", color=ACCENT if on else MUTED, markersize=9 if name == chosen
                      else 5.5, alpha=1.0 if on else 0.5)  # fmt: skip
            low_x, low_y = (lows or {}).get(name, (None, None))
            axes.plot([x if low_x is None else low_x, x, x], [y, y, y if low_y is None else low_y],
                      color=ACCENT if on else MUTED, linewidth=0.7, alpha=0.7)  # fmt: skip
        least_x, least_y = wanted
        if least_x is not None:
            axes.axvline(least_x, color=MID, linewidth=0.8, dashes=(1, 2))
        if least_y is not None:
            axes.axhline(least_y, color=MID, linewidth=0.8, dashes=(1, 2))
        if bound is not None:
            axes.axvline(bound, color=MID, linewidth=0.8, dashes=(5, 3))
        axes.margins(x=0.16, y=0.14)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _grid_lines(axes)
        stressed_first = sorted(points, key=lambda name: (name != chosen, name not in efficient))
        _name_points(axes, {name: points[name] for name in stressed_first}, {
            name: {"color": INK if name in efficient else MUTED,
                   "weight": "bold" if name == chosen else "normal"} for name in points
        })  # fmt: skip

    title = f"{ylabel} over {xlabel}: {', '.join(efficient)} on the frontier"
    return Plot(svg=_svg(draw, size=(5.2, 3.4), title=title), caption=caption)


def _name_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write names beside points, the first ones first, each where it hides least of the others."""
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout is known from here on
    edge = axes.bbox
    at = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at.values()]

    def hidden(box: Bbox) -> float:
        """Area of a name's box that lies on others or outside."""
        shared = [Bbox.intersection(box, other) for other in taken]
        inside = Bbox.intersection(box, edge)
        outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
        return outside + sum(both.width * both.height for both in shared if both)

    for name, point in points.items():
        best: tuple[float, Bbox, Any] | None = None
        for y, (side, x) in product((4, -11, 15, -22), NAME_SIDES.items()):
            text = axes.annotate(
                name, point, xytext=(x, y), textcoords="offset points", ha=side, fontsize=8,
                **styles[name],
            )  # fmt: skip
            box = text.get_window_extent()
            found = (hidden(box), box, text)
            better, worse = (found, best) if best is None or found[0] < best[0] else (best, found)
            if worse is not None:
                worse[2].remove()
            best = better
        assert best is not None
        taken.append(best[1])


def _heat_map(
    axes: Axes, name: str, values: Mapping[tuple[float, float], float], *, nats: bool
) -> None:
    from matplotlib.patches import Rectangle

    alphas = sorted({alpha for alpha, _ in values})
    betas = sorted({beta for _, beta in values})
    worst, best = (max, min) if nats else (min, max)
    low, high = worst(values.values()), best(values.values())
    for (alpha, beta), value in values.items():
        x, y = alphas.index(alpha), betas.index(beta)
        share = 1.0 if high == low else (value - low) / (high - low)
        tile = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=ACCENT, linewidth=0)
        tile.set_alpha(round(0.06 + 0.44 * share, 3))
        axes.add_patch(tile)
        text = f"{as_perplexity(value):,.1f}" if nats else f"{100 * value:.1f}"
        axes.text(x, y, text, ha="center", va="center", color=INK)
    axes.set_xlim(-0.5, len(alphas) - 0.5)
    axes.set_ylim(-0.5, len(betas) - 0.5)
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes.tick_params(length=0)
    axes.set_xlabel("alpha")
    axes.set_title(name, loc="left", fontsize=9, color=INK, pad=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _plain_log_ticks(axes: Axes, low: float, high: float) -> None:
    """Ticks at 1, 2, 5 times powers of ten (finer when the range is small), as plain numbers."""
    steps = (1, 2, 5) if high / low > 6 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    ticks = [step * 10.0**power for power in range(-1, 12) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _grid_lines(axes: Axes) -> None:
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _svg(
    draw: Callable[..., None], *, size: tuple[float, float], title: str, columns: int = 1
) -> str:
    """Draw with matplotlib (size in inches) and adapt the result to the page."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'blindtune[report]'") from error
    out = io.StringIO()
    style: AbstractContextManager[Any] = mpl.rc_context({**STYLE, "svg.hashsalt": "blindtune"})
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(*figure.subplots(1, columns, squeeze=False)[0])
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _adapt(out.getvalue(), title)


def _adapt(svg: str, title: str) -> str:
    """Inline SVG: page colours and font, unique ids, a text alternative, no namespaces."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    assert view_box is not None, "matplotlib writes a view box"
    label = escape(title, quote=True)
    opening = f'<svg viewBox="{view_box[1]}" role="img" aria-label="{label}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(font: (?:bold |\d+ )?[\d.]+px) [^;\"]*", r"\1 inherit", svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.strip()
