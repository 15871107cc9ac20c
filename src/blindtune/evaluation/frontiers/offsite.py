"""The privacy-utility frontier of a model: many settings on the same data, scored alike.

The model owner tries settings (N_a, alpha, beta) on data of the data owner's kind before shipping
anything. What the settings share is made once: one study, the full model untouched (ZS) and tuned
whole (FT), and for every N_a its adapter layers tuned on the full model (direct). A setting is then
emulated, tuned and plugged in as the two parties would, from the package that would be shipped.

Every tuning is run once a seed; `scores` says what follows from all rows. Every finished
row is kept in OUT/rows, under a digest of all that decides it.

`split_frontier` sweeps the knobs of split tuning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blindtune.errors import ConfigError
from blindtune.evaluation.frontiers.scores import Frontier, gathered
from blindtune.evaluation.frontiers.sweeps import KeptRows, Row, digest_of
from blindtune.evaluation.utility.loss import loss_of_each
from blindtune.kinds import check_kinds
from blindtune.models.costs import decoder_cost
from blindtune.models.decoder import Decoder, check_context, context_limit
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.offsite.adapter import AdapterConfig, write_adapter
from blindtune.offsite.emulator import Emulator, adapter_indices, adapter_parameters, open_emulator
from blindtune.offsite.model_owner.emulation import EmulatorConfig, emulate, replaced_layers
from blindtune.offsite.model_owner.importance import DynamicConfig
from blindtune.offsite.model_owner.plugin import plug_in
from blindtune.offsite.model_owner.study import FACTS_NAME, Study, StudyConfig, open_study
from blindtune.offsite.model_owner.studying import OnStage, study
from blindtune.places import located
from blindtune.training.loop import RunConfig, TrainingConfig, fit
from blindtune.training.text import DataConfig, load_dataset_file

HOLDS = "nats of every test text"
"""What a row has of a model; rows of means alone, as they were once, are made again."""


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Which settings are tried, and how each is tuned and scored."""

    adapter_layers: tuple[int, ...] = (2,)
    """Values of N_a."""
    alpha: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Values of alpha, the share of middle layers replaced."""
    beta: tuple[float, ...] = (1.0, 0.8, 0.5, 0.2)
    """Values of beta, the share of the attention's rank kept."""
    max_length: int = 128
    """Tokens of a window of plain text, and the most of any example."""
    test_share: float = 0.2
    """Share of the data that is scored on and not tuned on, where there is no test file."""
    steps: int = 100
    """Optimizer steps of every tuning."""
    batch_size: int = 4
    """Examples a step."""
    learning_rate: float = 6e-4
    """Of adapters."""
    ft_learning_rate: float = 2e-4
    """Of full fine-tuning."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the order of examples. Each setting is tuned once a seed; with several the lower
    ends of recovery and gap cover the choice of the seed, not that of test texts alone."""
    split_seed: int = 0
    """Of the choice of the test share."""

    def __post_init__(self) -> None:
        """Refuse empty sweeps and values out of range; each setting is checked when it is made."""
        check_kinds(self)
        if not (self.adapter_layers and self.alpha and self.beta and self.seeds):
            raise ConfigError(
                "expected at least one value each of adapter_layers, alpha, beta and seeds"
            )
        if not 0 < self.test_share < 1 or min(self.ft_learning_rate, self.learning_rate) <= 0:
            raise ConfigError(
                "expected test_share between 0 and 1 and learning rates above 0, got "
                f"{self.test_share}, {self.learning_rate}, {self.ft_learning_rate}"
            )
        if self.max_length < 2 or self.steps < 1 or self.batch_size < 1:
            raise ConfigError(
                "expected max_length >= 2, steps >= 1 and batch_size >= 1, got "
                f"{self.max_length}, {self.steps}, {self.batch_size}"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """Every N_a once."""
        return tuple(sorted(set(self.adapter_layers)))

    @property
    def runs(self) -> tuple[int, ...]:
        """Every seed once."""
        return tuple(sorted(set(self.seeds)))

    @property
    def triplets(self) -> tuple[EmulatorConfig, ...]:
        """Every setting, mildest first."""
        sweep = product(self.ends, sorted(set(self.alpha)), sorted(set(self.beta))[::-1])
        return tuple(EmulatorConfig(adapter_layers=n, alpha=a, beta=b) for n, a, b in sweep)


def frontier(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: FrontierConfig | None = None,
    *,
    public: str | Path | None = None,
    made_study: str | Path | None = None,
    test: str | Path | None = None,
    how: StudyConfig | None = None,
    dynamic: DynamicConfig | None = None,
    on_stage: OnStage | None = None,
) -> Frontier:
    """Sweep settings; rows that are there under the same digest are not run again.

    Args:
        model: a local directory, a hub name, or an embedded model.
        data: data of the data owner's kind: tuned on, and its test share scored on.
        out: directory of rows, study and work.
        config: the sweep.
        public: text that the study reads; None: `data`, which flatters every emulator.
        made_study: a study that is there; then none is made.
        test: scored on instead of a share of `data`.
        how, dynamic: of the study that is made.
        on_stage: progress.

    Raises:
        ModelError, DataError, ConfigError, OutputError: see errors.py.
    """
    config, out = config or FrontierConfig(), located(out)
    sweep = _Sweep(model, data, test, out, config)
    with sweep.rows.alone():
        text = str(public or data) if made_study is None else f"what {made_study} was made from"
        if made_study is None:
            how = how or StudyConfig(max_length=config.max_length)
            how = replace(how, min_adapter_layers=min(config.adapter_layers))
            made_study = out / sweep.study_name(text, how, dynamic or DynamicConfig())
            if not (made_study / FACTS_NAME).is_file():
                study(model, text, made_study, how, dynamic, on_stage=on_stage)
        found = open_study(made_study)
        if found.fingerprint != sweep.fingerprint:
            raise ConfigError(
                f"{made_study}: expected a study of {model}, got one of another model"
            )
        for triplet in config.triplets:
            replaced_layers(found, triplet)  # refused before anything is tuned
        mark = hashlib.sha256((Path(made_study) / FACTS_NAME).read_bytes()).hexdigest()
        report = _Report(on_stage, config)
        zs = report.done(sweep.untouched())
        ft = [report.done(sweep.on_full_model(None, seed)) for seed in config.runs]
        direct = {
            n: [report.done(sweep.on_full_model(n, seed)) for seed in config.runs]
            for n in config.ends
        }
        tried = {
            triplet: [report.done(row) for row in sweep.setting(found, mark, triplet)]
            for triplet in config.triplets
        }
    return gathered(zs, ft, direct, tried, study_text=text)


@final
class _Report:
    """Counts rows that are done."""

    def __init__(self, on_stage: OnStage | None, config: FrontierConfig) -> None:
        self._on_stage, self._count = on_stage, 0
        self._total = 1 + len(config.runs) * (1 + len(config.ends) + len(config.triplets))

    def done(self, row: Row) -> Row:
        """One more."""
        self._count += 1
        if self._on_stage is not None:
            self._on_stage("rows", self._count, self._total)
        return row


@final
@dataclass(frozen=True)
class _Shipped:
    """An emulator as it is shipped, to be tuned once a seed."""

    emulator: Emulator
    adapter: Mapping[str, Tensor]
    """Its adapter's weights, untuned."""
    facts: Row
    """What all seeds' rows say of it."""

    @torch.no_grad()
    def restore(self) -> None:
        """Undo a tuning."""
        indices = self.emulator.adapter_indices
        for name, parameter in adapter_parameters(self.emulator.model, indices):
            parameter.copy_(self.adapter[name])


@final
class _Sweep:
    """The rows of one sweep: the data, read once, and where rows are kept."""

    def __init__(
        self,
        model: str | Path,
        data: str | Path,
        test: str | Path | None,
        out: Path,
        config: FrontierConfig,
    ) -> None:
        self.model, self.rows, self.config = model, KeptRows(out), config
        tokenizer, reading = load_tokenizer(model), DataConfig(max_length=config.max_length)
        everything = load_dataset_file(data, tokenizer, reading)
        if test is None:
            self.train, self.test = everything.split(config.test_share, config.split_seed)
        else:
            self.train, self.test = everything, load_dataset_file(test, tokenizer, reading)
        full = load_model(model)
        check_context(config.max_length, context_limit(full.config))
        self.fingerprint = fingerprint(full)

    def study_name(self, text: str, how: StudyConfig, dynamic: DynamicConfig) -> str:
        """Where a study of this text lies, so that one of another text is not taken for it."""
        reading = DataConfig(max_length=how.max_length)
        read = load_dataset_file(text, load_tokenizer(self.model), reading).fingerprint()
        return f"study-{digest_of([self.fingerprint, read, asdict(how), asdict(dynamic)])}"

    def untouched(self) -> Row:
        """The full model as it is."""
        return self._row("zs", {}, lambda: self._losses(load_model(self.model)))

    def on_full_model(self, adapter_layers: int | None, seed: int) -> Row:
        """The full model tuned, all of its weights or its adapter layers alone."""
        c = self.config
        rate = c.ft_learning_rate if adapter_layers is None else c.learning_rate

        def make() -> Row:
            full = load_model(self.model)
            if adapter_layers is not None:
                full.requires_grad_(False)
                indices = adapter_indices(adapter_layers, Decoder(full).layer_count)
                for _, parameter in adapter_parameters(full, indices):
                    parameter.requires_grad_(True)
            self._fit(full, rate, seed)
            return self._losses(full)

        name = "ft" if adapter_layers is None else f"direct-{adapter_layers}"
        own = {**self._tuning(rate, seed), "layers": adapter_layers}
        return self._row(f"{name}-seed{seed}", own, make)

    def setting(self, made_study: Study, mark: str, triplet: EmulatorConfig) -> Iterator[Row]:
        """Emulate, then tune, plug in and score once a seed; `mark` tells the study from others.

        The emulator does not depend on the seed: it is made for the first row that is missing.
        """
        t, rate = triplet, self.config.learning_rate
        shipped = cache(partial(self._shipped, made_study, triplet))
        for seed in self.config.runs:
            own = {**self._tuning(rate, seed), "triplet": asdict(t), "study": mark}
            name = f"{t.adapter_layers}-{t.alpha:g}-{t.beta:g}-seed{seed}"
            yield self._row(name, own, partial(self._plugged_in, shipped, seed))

    def _shipped(self, made_study: Study, triplet: EmulatorConfig) -> _Shipped:
        place = self.rows.work / "emulator"
        made = emulate(made_study, place, triplet, model=self.model)
        opened = open_emulator(place, dtype=torch.float32)
        before = self._losses(opened.model)
        facts = {
            "emulator_zs": before["nats"],
            "tokens": before["tokens"],
            "parameters": made.parameters,
            "bytes": sum(p.stat().st_size for p in place.iterdir()),
            "flops_per_token": tuning_flops(opened, self.config.max_length),
        }
        adapter = adapter_parameters(opened.model, opened.adapter_indices)
        return _Shipped(opened, {name: p.detach().clone() for name, p in adapter}, facts)

    def _plugged_in(self, shipped: Callable[[], _Shipped], seed: int) -> Row:
        emulator, adapter = shipped().emulator, self.rows.work / "adapter"
        shipped().restore()
        self._fit(emulator.model, self.config.learning_rate, seed)
        write_adapter(emulator, AdapterConfig(), adapter)
        # The owner's own adapter: a setting that changes much is a row, no reason to stop.
        plugged = plug_in(self.model, adapter, None, accept_large_change=True).model
        return {
            **shipped().facts,
            "emulator_ft": self._losses(emulator.model)["nats"],
            "plug_in": self._losses(plugged)["nats"],
        }

    def _tuning(self, rate: float, seed: int) -> dict[str, Any]:
        c = self.config
        return {"train": self.train.fingerprint(), "tuning": [c.steps, c.batch_size, rate, seed]}

    def _row(self, name: str, own: Mapping[str, Any], make: Callable[[], Row]) -> Row:
        """The row of this name, from OUT/rows or made now."""
        test = self.test.fingerprint()
        decides = {"holds": HOLDS, "model": self.fingerprint, "test": test, **own}
        return self.rows.row(name, decides, make)

    def _fit(self, model: PreTrainedModel, rate: float, seed: int) -> None:
        c = self.config
        training = TrainingConfig(
            learning_rate=rate,
            max_steps=c.steps,
            per_device_train_batch_size=c.batch_size,
            seed=seed,
        )
        run = RunConfig(silent=True, resume="never", save_steps=c.steps)
        fit(model, self.train, None, training, self.rows.work / "fit", run=run)

    def _losses(self, model: PreTrainedModel) -> Row:
        nats_N, tokens_N = loss_of_each(model, [self.test[i] for i in range(len(self.test))])
        return {"nats": nats_N.tolist(), "tokens": [int(n) for n in tokens_N]}


def tuning_flops(emulator: Emulator, length: int) -> float:
    """FLOPs a token of tuning all weights of an emulator's adapter layers."""
    cost = decoder_cost(Decoder(emulator.model), length)
    stack = cost.stack()
    weights = sum(cost.layers[i].weights for i in emulator.adapter_indices)
    return stack.forward + stack.backward + cost.head.forward + cost.head.backward + weights
