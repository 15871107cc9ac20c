"""How many planted secrets an adapter gives away: ranks of canaries, and what they mean.

The attack is `attacks.membership.loss_drops`: it is given every candidate code of a canary, in the
canary's own sentence, and ranks them by how much the adapter lowered the loss. It does not know
which one was planted; this module does.

Of several canaries that were planted equally often the mean exposure is given, and the chance of
ranks as good if none had been trained on (Fisher's method: for a uniform rank the exposures' sum,
in nats, is at most Gamma distributed; ties and few candidates make the chance larger, never
smaller).

Shapes: K candidates of one canary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from blindtune.attacks.membership import AdapterView, loss_drops
from blindtune.errors import DataError
from blindtune.evaluation.audits.audit import Finding
from blindtune.evaluation.leakage.exposure import Exposure, exposure
from blindtune.training.batches import padding_id
from blindtune.training.canaries import Canary
from blindtune.training.dataset import TokenDataset
from blindtune.training.records import record_shape
from blindtune.training.text import DataConfig, encode_rows

SMALL = 0.01
"""Chance below which ranks count as a leak."""
KNEW = (
    "Had the model with and without the adapter, and a planted sentence with every candidate code; "
    "ranked the codes by how much the adapter lowered the loss."
)


@dataclass(frozen=True, kw_only=True)
class CanaryLeakage:
    """The canaries that were planted equally often."""

    repeats: int
    exposures: tuple[Exposure, ...]

    @property
    def bits(self) -> float:
        """Mean exposure."""
        return sum(e.bits for e in self.exposures) / len(self.exposures)

    @property
    def most_bits(self) -> float:
        """Exposure of canaries that are all found first."""
        return sum(math.log2(e.candidates) for e in self.exposures) / len(self.exposures)

    @property
    def blind_bits(self) -> float:
        """Mean exposure of canaries that were never trained on: all ranks are equally likely."""
        of = [e.candidates for e in self.exposures]
        return sum(math.log2(count) - math.lgamma(count + 1) / math.log(2) / count for count in of
                   ) / len(of)  # fmt: skip

    @property
    def found_first(self) -> int:
        """How many came first of all candidates."""
        return sum(e.rank == 1 for e in self.exposures)

    @property
    def p_value(self) -> float:
        """Chance of ranks as good as these together if none was trained on; at most."""
        nats = math.log(2) * sum(e.bits for e in self.exposures)
        powers = (k * math.log(nats) - math.lgamma(k + 1) for k in range(1, len(self.exposures)))
        if nats == 0:
            return 1.0
        return min(1.0, math.exp(-nats) + sum(math.exp(power - nats) for power in powers))


def canary_leakage(
    tuned: nn.Module,
    untuned: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    canaries: Sequence[Canary],
    reading: DataConfig | None = None,
    *,
    trained: TokenDataset | None = None,
    batch_size: int = 32,
) -> tuple[CanaryLeakage, ...]:
    """Rank every canary among its candidates; fewest repeats first.

    Args:
        tuned: a causal model with the adapter that was tuned on the planted copy.
        untuned: the same model without.
        tokenizer: of both.
        canaries: from `training.canaries.read_canaries`.
        reading: as at tuning; candidates are never packed.
        trained: what was trained on, where records stand by themselves: a canary counts as often
            as it is in there, for one may have been set aside for validation. None: as planted.
        batch_size: candidates of one forward pass; changes no rank but by rounding.

    Raises:
        DataError: a canary does not fit into `reading.max_length`, or two codes read alike.
    """
    reading = reading or DataConfig()
    found: dict[int, list[Exposure]] = {}
    for canary in canaries:
        candidates = encoded_candidates(canary, tokenizer, reading)
        view = AdapterView(
            tuned=tuned,
            untuned=untuned,
            records=tuple(candidates[i] for i in range(len(candidates))),
            pad_token_id=padding_id(untuned),
            batch_size=batch_size,
        )
        repeats = canary.repeats
        packed = reading.pack and _is_text(canary, reading)
        if trained is not None and not packed:
            repeats = trained.count(candidates.input_ids[0])
        found.setdefault(repeats, []).append(exposure(loss_drops(view), 0))
    return tuple(CanaryLeakage(repeats=r, exposures=tuple(found[r])) for r in sorted(found))


def canary_findings(leaks: Sequence[CanaryLeakage]) -> tuple[Finding, ...]:
    """A row of the audit for every number of repeats."""
    return tuple(_finding(leak) for leak in leaks)


def canary_verdict(leaks: Sequence[CanaryLeakage]) -> str:
    """One sentence on the canaries; fewest repeats that leaked come first."""
    leaking = [leak for leak in leaks if leak.repeats and leak.p_value < SMALL]
    if not any(leak.repeats for leak in leaks):
        return "No planted code was trained on: all were set aside for validation, plant more."
    if not leaking:
        return "No planted code came out better than chance."
    least = leaking[0]
    return (
        f"Codes planted {_times(least.repeats)} come out: {least.found_first} of "
        f"{len(least.exposures)} first of {least.exposures[0].candidates:,} candidates, "
        f"{least.bits:.1f} of {least.most_bits:.1f} bits on average."
    )


def _finding(leak: CanaryLeakage) -> Finding:
    count, times = len(leak.exposures), _times(leak.repeats)
    ranks = ", ".join(str(e.rank) for e in leak.exposures[:8]) + (", …" if count > 8 else "")
    return Finding(
        attack=f"canaries, {times}",
        knew=KNEW,
        measure="exposure, bits",
        value=leak.bits,
        meaning=f"The codes of {count} canaries, {times} planted, came at rank {ranks} of "
        f"{leak.exposures[0].candidates:,}; {leak.most_bits:.1f} bits would be first each time, "
        f"{leak.blind_bits:.1f} is what unplanted codes have on average. Chance of ranks as good "
        f"without any leak: {leak.p_value:.2g}.",
    )


def _times(repeats: int) -> str:
    return {0: "never", 1: "once"}.get(repeats, f"{repeats} times")


def _is_text(canary: Canary, reading: DataConfig) -> bool:
    return record_shape(canary.record, reading.text_column, "canary") == "text"


def encoded_candidates(
    canary: Canary, tokenizer: PreTrainedTokenizerBase, reading: DataConfig
) -> TokenDataset:
    """Every candidate of a canary as `tune` would read it, the planted one first."""
    codes = (canary.code, *canary.others)
    rows = (("canary", canary.with_code(code)) for code in codes)
    reading = replace(reading, pack=False, max_samples=None, max_tokens=None)
    found = encode_rows(rows, "canaries", tokenizer, reading)
    different = {tuple(ids.tolist()) for ids in found.input_ids}
    if found.truncated or not len(codes) == len(found) == len(different):
        raise DataError(
            f"expected {len(codes)} canaries that differ within max_length "
            f"{reading.max_length}, got {len(different)}, {found.truncated} of them cut: raise "
            "--max-length, or plant codes that this tokenizer tells apart"
        )
    return found
