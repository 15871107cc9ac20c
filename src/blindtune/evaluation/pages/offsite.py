"""Whole reports, from what the acts return."""

from __future__ import annotations

from dataclasses import asdict

from blindtune.evaluation.pages import sections, tables
from blindtune.evaluation.pages.report import Report
from blindtune.evaluation.utility.scoreboard import Scoreboard
from blindtune.offsite.data_owner.tuning import Tuning
from blindtune.offsite.model_owner.emulation import Emulation
from blindtune.offsite.model_owner.study import Study


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
