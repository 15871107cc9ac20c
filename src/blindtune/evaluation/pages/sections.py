"""The parts of a report on offsite-tuning: what comes out of a run, as sections of a page."""

from __future__ import annotations

from collections.abc import Sequence

from blindtune.evaluation.pages import plots, tables
from blindtune.evaluation.pages.report import LayerStrip, Plot, Section, Table
from blindtune.evaluation.utility.scoreboard import PLUG_IN, ZS, Cost, Scoreboard, as_perplexity


def headline(board: Scoreboard) -> list[tuple[str, str]]:
    """The figures that matter, for ``Report.numbers``; those that cannot be had are left out."""
    nats = board.measure == "nats"

    def show(name: str) -> str:
        mean = board.spread(name).mean
        return f"{as_perplexity(mean):,.1f}" if nats else f"{100 * mean:.1f} %"

    numbers = []
    recovery, delta = board.recovery(), board.delta()
    if recovery is not None:
        numbers.append((f"{100 * recovery.mean:.0f} %", "of full fine-tuning's gain recovered"))
    if PLUG_IN in board.rows:
        before = f" ({show(ZS)} before)" if ZS in board.rows else ""
        measure = "plug-in perplexity" if nats else "plug-in accuracy"
        numbers.append((show(PLUG_IN), measure + before))
    if delta is not None:
        size, unit = (f"{delta.mean:.2f}", "nats") if nats else (f"{delta.mean:.1f}", "points")
        numbers.append((size, f"{unit} better than the tuned emulator"))
    return numbers


def scores(board: Scoreboard, *, title: str = "What the tuned model is worth") -> Section:
    """The rows of a scoreboard as plot and table."""
    header, rows = tables.score_cells(board)
    several = f"Mean of {board.runs} runs, bars show one standard deviation. "
    return Section(
        title=title,
        text=[
            f"Measured on {board.data}. The data owner holds Emulator FT; the model owner ends "
            "with Plug-in."
        ],
        blocks=[
            plots.five_rows(
                board,
                caption=(several if board.runs > 1 else "")
                + "The dashed line is the full model, untouched.",
            ),
            Table(header=header, rows=rows, emphasis=PLUG_IN),
        ],
        notes=tables.verdict(board),
    )


def emulator(
    kinds: Sequence[str],
    importance: Sequence[float] = (),
    *,
    first_layer: int = 0,
    title: str = "The emulator",
) -> Section:
    """The layers of an emulator and, for the model owner, the scores behind the choice.

    Args:
        kinds: of every layer from bottom to top, keys of ``report.LAYER_KINDS``.
        importance: score of each middle layer; private to the model owner, may be empty.
        first_layer: number of the layer that the first score belongs to.
        title: of the section.
    """
    blocks: list[LayerStrip | Plot | Table] = [LayerStrip(kinds=kinds)]
    if importance:
        replaced = [layer for layer, kind in enumerate(kinds) if kind == "harmonizer"]
        blocks.append(
            plots.importance(
                importance,
                first_layer=first_layer,
                replaced=replaced,
                caption="Importance scores of the middle layers; hollow ones were replaced.",
            )
        )
    return Section(title=title, blocks=blocks)


def tuning(
    training: plots.Points, validation: plots.Points, *, title: str = "Tuning at the data owner"
) -> Section:
    """Training loss and the emulator's validation loss, as (step, nats per token)."""
    name = "emulator, validation"
    lines = {"training": training, name: validation}
    drawn = plots.curves(
        {label: points for label, points in lines.items() if points},
        stressed=name,
        caption="The marked step has the lowest validation loss of the emulator, the only one "
        "that the data owner can see.",
    )
    return Section(title=title, blocks=[drawn])


def costs(entries: Sequence[Cost], *, title: str = "Sizes and times") -> Section:
    """Parameters, bytes, tokens and seconds."""
    header, rows = tables.cost_cells(entries)
    return Section(title=title, blocks=[Table(header=header, rows=rows)])
