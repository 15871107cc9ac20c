"""What a sweep of (N_a, alpha, beta) found: scores, how low they may be, and the cheapest setting.

Recovery is (ZS - plug-in) / (ZS - FT) in nats: the share of full fine-tuning's gain that the owner
gets. The gap is emulator FT - plug-in in nats a token: how much worse is what the data owner keeps.
Every tuning is run once a seed, and scores are means over seeds. A question is answered by lower
ends at 95 % confidence (`paired`): over test texts, which all models score alike, and, where there
are several seeds, over seeds too. Each end is at 95 % by itself. A setting that misses what is
asked for, one of two wishes or both, passes with a chance of 5 % at most; of many such one may.

Shapes: K seeds, N test texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor

from blindtune.evaluation.frontiers.sweeps import Row, unbeaten
from blindtune.evaluation.utility.paired import mean_of, ratio_low
from blindtune.evaluation.utility.scoreboard import LEAST_GAIN
from blindtune.offsite.model_owner.emulation import EmulatorConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting's scores, in nats a token of test text (means over seeds), and its costs."""

    adapter_layers: int
    alpha: float
    beta: float
    emulator_zs: float
    emulator_ft: float
    plug_in: float
    gap_low: float | None
    """With 95 % confidence the gap is at least this; None: a single test text tells nothing."""
    recovery_low: float | None
    """The same of the recovery; None where it is undefined."""
    parameters: int
    """Of the emulator."""
    bytes: int
    """Of the package."""
    flops_per_token: float
    """Of one step of tuning, at the data owner."""

    @property
    def gap(self) -> float:
        """How much worse the tuned emulator is than the plug-in, nats a token."""
        return self.emulator_ft - self.plug_in

    @property
    def name(self) -> str:
        """The triplet in short."""
        return f"{self.adapter_layers}, {self.alpha:g}, {self.beta:g}"


@final
@dataclass(frozen=True, kw_only=True)
class Frontier:
    """All that was measured."""

    zs: float
    ft: float
    gain_low: float | None
    """With 95 % confidence full fine-tuning gains at least this over ZS, nats a token."""
    direct: Mapping[int, float]
    """By N_a: the adapter layers tuned on the full model, which neither party could do."""
    settings: tuple[Setting, ...]
    test_texts: int
    """Examples or windows that were scored."""
    test_tokens: int
    seeds: int
    """How often each setting was tuned."""
    study_text: str
    """What the study read."""

    def recovery(self, nats: float) -> float | None:
        """Share of full fine-tuning's gain; None where it is not sure to gain anything."""
        if self.gain_low is None or self.gain_low < LEAST_GAIN:
            return None
        return (self.zs - nats) / (self.zs - self.ft)

    def efficient(self) -> tuple[Setting, ...]:
        """Settings that no other one beats in plug-in and gap at once, best plug-in first."""
        return unbeaten(self.settings, lambda s: (-s.plug_in, s.gap))

    def cheapest(
        self, recovery: float | None, gap: float | None, *, surely: bool = True
    ) -> Setting | None:
        """The setting that tunes with the fewest FLOPs and reaches both; None if none does.

        Args:
            recovery, gap: what must be reached; None: anything will do.
            surely: by the lower ends; otherwise by the scores themselves, which may be luck.
        """

        def reaches(setting: Setting) -> bool:
            recovered = setting.recovery_low if surely else self.recovery(setting.plug_in)
            found = (recovered, recovery), (setting.gap_low if surely else setting.gap, gap)
            return all(least is None or (x is not None and x >= least) for x, least in found)

        fit_for = filter(reaches, self.settings)
        return min(fit_for, key=lambda s: (s.flops_per_token, s.plug_in), default=None)

    def facts(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        efficient = self.efficient()
        rows = [
            asdict(s)
            | {
                "gap": s.gap,
                "recovery": self.recovery(s.plug_in),
                "efficient": s in efficient,
            }
            for s in self.settings
        ]
        names = ("zs", "ft", "gain_low", "test_texts", "test_tokens", "seeds", "study_text")
        plain = {name: getattr(self, name) for name in names}
        direct = {str(n): nats for n, nats in self.direct.items()}
        return plain | {"direct": direct, "settings": rows}


def gathered(
    zs: Row,
    ft: Sequence[Row],
    direct: Mapping[int, Sequence[Row]],
    tried: Mapping[EmulatorConfig, Sequence[Row]],
    *,
    study_text: str,
) -> Frontier:
    """Means and lower ends from the rows of all seeds, each list in the same order of seeds.

    Args:
        zs: {"nats": nats of every test text, "tokens": its scored tokens}.
        ft, direct: the like, and direct by N_a.
        tried: by setting, {"emulator_zs", "emulator_ft", "plug_in": nats of every test text,
            "parameters", "bytes", "flops_per_token"}.
        study_text: what the study read.
    """
    tokens_N = torch.tensor(zs["tokens"], dtype=torch.float64)

    def losses(rows: Sequence[Row], name: str = "nats") -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    def mean(nats_KN: Tensor) -> float:
        return float(nats_KN.mean(0).sum() / tokens_N.sum())

    zs_1N, ft_KN = losses([zs]), losses(ft)
    gain = mean_of(zs_1N - ft_KN, tokens_N)
    settings = []
    for t, rows in tried.items():
        kept_KN, plugged_KN = losses(rows, "emulator_ft"), losses(rows, "plug_in")
        own = mean_of(zs_1N - plugged_KN, tokens_N)
        settings.append(Setting(
            adapter_layers=t.adapter_layers, alpha=t.alpha, beta=t.beta,
            emulator_zs=mean(losses(rows, "emulator_zs")), emulator_ft=mean(kept_KN),
            plug_in=mean(plugged_KN),
            gap_low=_known(mean_of(kept_KN - plugged_KN, tokens_N).low),
            recovery_low=ratio_low(own, gain) if gain.low >= LEAST_GAIN else None,
            **{name: rows[0][name] for name in ("parameters", "bytes", "flops_per_token")},
        ))  # fmt: skip
    return Frontier(
        zs=mean(zs_1N), ft=mean(ft_KN), gain_low=_known(gain.low),
        direct={n: mean(losses(rows)) for n, rows in direct.items()}, settings=tuple(settings),
        test_texts=len(tokens_N), test_tokens=int(tokens_N.sum()), seeds=len(ft),
        study_text=study_text,
    )  # fmt: skip


def _known(low: float) -> float | None:
    return low if math.isfinite(low) else None
