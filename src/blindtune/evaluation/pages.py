"""Whole reports, from what the acts return."""

from __future__ import annotations

from dataclasses import asdict

from blindtune.evaluation import sections, tables
from blindtune.evaluation.report import Report
from blindtune.evaluation.scoreboard import Scoreboard
from blindtune.offsite.emulation import Emulation
from blindtune.offsite.study import Study
from blindtune.offsite.tuning import Tuning


def offsite_page(board: Scoreboard, study: Study, emulation: Emulation, tuning: Tuning) -> Report:
    """An offsite run: the five rows, the emulator's layers, the tuning curves, sizes and times.

    Holds the study's scores: a page for the model owner.
    """
    kinds = [type(layer).__name__.removesuffix("Layer").lower() for layer in emulation.layers]
    return Report(
        title="Offsite-tuning",
        subtitle=f"{study.model}, tuned without anyone seeing both the model and the data",
        summary=tables.verdict(board),
        numbers=sections.headline(board),
        sections=[
            sections.scores(board),
            sections.emulator(kinds, study.scores_M.tolist(), first_layer=study.first),
            sections.tuning(tuning.training.train_loss, tuning.training.validation_loss),
            sections.costs(board.costs),
        ],
        facts={
            "Study": asdict(study.config),
            "Dynamic LayerReplace": asdict(study.dynamic),
            "Emulator": asdict(emulation.config),
        },
    )
