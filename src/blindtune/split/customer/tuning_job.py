"""The customer's act: tune a vendor's model on private texts, from a file to a tuned job.

Everything that decides the result is settled and stored before the vendor hears of the job: texts
are noised once, the secret of the job is drawn, the privacy statement is shown. From then on the
job outlives both parties' crashes: the same call goes on, and nothing is trained twice.

Guarantee and what is not covered: `private_states`, `privacy_statement`, docs/split.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from blindtune.errors import DataError, OutputError, PolicyError
from blindtune.exchange.packages.signing import Trust
from blindtune.places import located
from blindtune.privacy.entropy import system_uniforms
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.bottom import Bottom, open_bottom
from blindtune.split.customer.access import (
    AccessConfig,
    Connect,
    Traffic,
    connector,
    saying_what_next,
)
from blindtune.split.customer.job import MARK, CustomerJob, JobRecord, texts_hash
from blindtune.split.customer.own_groups import OnPart, make_groups
from blindtune.split.customer.privacy_statement import (
    PrivacyStatement,
    choose_eta,
    state_privacy,
)
from blindtune.split.customer.private_gradients import (
    GradientConfig,
    GradientPlan,
    check_fit,
    plan_gradients,
)
from blindtune.split.customer.private_states import PrivateStates, privatize
from blindtune.split.customer.private_texts import PrivateTexts, ReadingConfig, read_training
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig, new_token
from blindtune.split.customer.tuning_run import Watch, Work, tune_two_part, tune_u_shape
from blindtune.split.terms import TuningConfig
from blindtune.training.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class SplitTuning:
    """A tuned job."""

    path: Path
    """The job's directory, for `predict`."""
    partition: str
    names: tuple[str, ...]
    """What the classes are called."""
    losses: tuple[float, ...]
    """Mean loss of every batch, in order."""
    steps: int
    """Optimizer steps of the whole job."""
    resumed_from: int | None
    """The step that an earlier call had reached; None: this one began the job."""
    tokens: int
    """That this call trained on."""
    tokens_per_second: float
    bytes_sent: int
    bytes_received: int
    privacy: PrivacyStatement
    seconds: float


def split_tune(
    vendor: str | Connect,
    bottom: str | Path,
    data: str | Path,
    out: str | Path,
    privatizer: PrivatizerConfig,
    tuning: TuningConfig | None = None,
    passes: PassConfig | None = None,
    *,
    dp: GradientConfig | None = None,
    reading: ReadingConfig | None = None,
    access: AccessConfig | None = None,
    resume: Literal["auto", "never"] = "auto",
    record: bool = False,
    on_statement: Callable[[PrivacyStatement], None] | None = None,
    on_part: OnPart = lambda _part, _done, _total: None,
    silent: bool = False,
    trust: Trust | None = None,
) -> SplitTuning:
    """Tune a vendor's model on private texts; interrupted, the same call goes on.

    Args:
        vendor: its address, or a function that makes a transport.
        bottom, data: the vendor's package; private texts, for a language model without labels.
        out: directory of the job; it holds the private texts and must stay here.
        privatizer: how the texts are noised. It decides privacy, and beside it only `dp` does.
        tuning, passes: how the vendor tunes; how often, in which batches the texts are sent.
        dp: U-shape: noise on gradients, which tell targets otherwise (`private_gradients`).
        reading: what the texts are for, and which columns hold them.
        access: the vendor's certificate, the customer's token, retries.
        resume: "never" refuses a job that is there instead of going on with it.
        record: keep all that crosses, in `predict` too, in the job's transcript.bin: for audits.
        on_statement, on_part: get the statement before anything is sent; how far that is.
        silent, trust: no progress bar; whose bottom packages are opened, None: anybody's.

    Raises:
        ConfigError: options that contradict each other, or are not those of the job that is there.
        DataError, PackageError, PolicyError, OutputError: see errors.py.
        NetworkError: the vendor cannot be reached; the job is kept.
    """
    access, traffic = access or AccessConfig(), Traffic()
    connect = connector(vendor, access, traffic, record=record)
    package = open_bottom(bottom, trust=trust)
    wanted = _Wanted(
        privatizer, tuning or TuningConfig(), passes or PassConfig(), dp or GradientConfig(),
        reading or ReadingConfig(),
    ).fitting(package)  # fmt: skip
    texts = read_training(package, data, wanted.reading)
    wanted = wanted.with_length(len(texts.ids))
    asked = _record(package, bottom, texts, wanted)
    job = _begin_or_find(package, located(out), asked, wanted, texts, resume, on_part)
    with job.working(record=record):
        private, statement = _prepare(job, package, texts, wanted, on_part)
        if on_statement is not None:
            on_statement(statement)
        work = Work(
            job, connect, access, traffic, package, private, wanted.tuning, wanted.passes,
            wanted.reading.task, _outputs(wanted, texts), statement.gradients, wanted.true_targets,
        )  # fmt: skip
        return _tune(work, statement, silent)


@dataclass(frozen=True)
class _Wanted:
    """Every option that decides the result."""

    privatizer: PrivatizerConfig
    tuning: TuningConfig
    passes: PassConfig
    dp: GradientConfig
    reading: ReadingConfig

    def fitting(self, package: Bottom) -> _Wanted:
        """The same for a package; ConfigError for what does not fit it, or each other."""
        self.privatizer.check_whole()
        partition = package.cut.partition
        privatizer = self.privatizer.for_task(self.reading.task, partition)
        check_fit(self.dp, privatizer, partition)
        return replace(self, privatizer=privatizer)

    def with_length(self, texts: int) -> _Wanted:
        """A schedule that needs a length gets the run's, where none is given."""
        if self.tuning.schedule == "constant" or self.tuning.max_steps:
            return self
        steps = len(self.passes.steps(texts))
        return replace(self, tuning=replace(self.tuning, max_steps=steps))

    @property
    def true_targets(self) -> bool:
        """Whether a language model shall predict the texts' own words."""
        return self.privatizer.targets == "true"

    def gradients(self, texts: int) -> GradientPlan | None:
        """The noise on the gradients of so many texts."""
        return plan_gradients(self.dp, self.reading.task, texts, self.passes.epochs)


def _outputs(wanted: _Wanted, texts: PrivateTexts) -> int:
    outputs = {"classification": len(texts.names), "regression": 1, "language-model": 0}
    return outputs[wanted.reading.task]


def _record(
    package: Bottom,
    place: str | Path,
    texts: PrivateTexts,
    wanted: _Wanted,
) -> JobRecord:
    labels = b"" if texts.labels is None else texts.labels.numpy().tobytes()
    return JobRecord(
        partition=package.cut.partition,
        bottom=package.id,
        bottom_path=str(located(place).absolute()),
        data=texts_hash(texts.ids, labels, "\0".join(texts.names).encode()),
        options=asdict(wanted),
        eta=wanted.privatizer.eta,
        names=texts.names,
    )


def _begin_or_find(
    package: Bottom,
    out: Path,
    record: JobRecord,
    wanted: _Wanted,
    texts: PrivateTexts,
    resume: str,
    on_part: OnPart,
) -> CustomerJob:
    """The job; what its options can be wrong about is known before it is there."""
    if not (out / MARK).exists():
        eta = choose_eta(package, texts.ids, wanted.privatizer)
        wanted.gradients(len(texts.ids))
        groups = _made_groups(package, wanted.privatizer, on_part)
        chosen = msgspec.structs.replace(record, eta=eta)
        job = CustomerJob.begin(out, chosen, new_token())
        if groups is not None:
            job.keep_groups(groups)
        return job
    if resume == "never":
        raise OutputError(
            f"{out}: a job is there, and another draw for the same texts would spend again: go on "
            "with it (--resume auto), or cancel it and choose another --out"
        )
    job = CustomerJob(out)
    job.check_same(record)
    return job


def _made_groups(
    package: Bottom, privatizer: PrivatizerConfig, on_part: OnPart
) -> WordGroups | None:
    grouping = privatizer.grouping()
    if grouping is None or privatizer.public_text is None:
        return None
    return make_groups(package, privatizer.public_text, grouping, on_part=on_part)


def _prepare(
    job: CustomerJob,
    package: Bottom,
    texts: PrivateTexts,
    wanted: _Wanted,
    on_part: OnPart,
) -> tuple[PrivateStates, PrivacyStatement]:
    """The private states and what sending them spends: made once, found again later."""
    if job.record.state == "cancelled":
        raise PolicyError(f"{job.path}: this job was cancelled: begin another with another --out")
    eta, classes, privatizer = job.record.eta, len(texts.names), wanted.privatizer
    private, groups = job.states(), job.groups()
    if groups is None and (groups := _made_groups(package, privatizer, on_part)) is not None:
        job.keep_groups(groups)
    if private is None:
        if job.record.state != "begun":
            raise DataError(
                f"{job.path}: the states that were sent are gone, and another draw for the same "
                "texts would spend again: put private.safetensors back, or give the job up"
            )
        if privatizer.label_epsilon is not None or wanted.dp.epsilon is not None:
            # In an order that nobody knows: the place in a sorted file would tell the label.
            texts = texts.taken(system_uniforms(len(texts.ids)).argsort().tolist())
        # Nothing was sent yet: what an earlier call drew and lost spent nothing.
        private = privatize(
            package,
            texts.ids,
            texts.labels,
            mechanism=privatizer.mechanism(eta),
            importance=privatizer.importance(),
            groups=groups,
            classes=classes,
            label_epsilon=privatizer.label_epsilon,
            predict_sent=privatizer.targets == "sent",
            on_progress=partial(on_part, "texts privatized"),
        )
        job.keep_states(private)
    statement = job.statements().get("tuning")
    if statement is None:
        statement = state_privacy(
            package, private, privatizer, eta,
            groups=groups, classes=classes, epochs=wanted.passes.epochs,
            gradients=wanted.gradients(len(texts.ids)), shortened=texts.shortened,
        )  # fmt: skip
        job.keep_statement("tuning", statement)
    return private, statement


def _tune(work: Work, statement: PrivacyStatement, silent: bool) -> SplitTuning:
    """Tune until the job is done, or find it done."""
    job, begin = work.job, time.perf_counter()
    steps = len(work.passes.steps(len(work.private)))
    watch = Watch(work)
    if job.record.state != "tuned":
        with (
            saying_what_next(),
            job.recording() as work.traffic.tap,
            progress_bar(steps, silent) as watch.show,
        ):
            if job.record.partition == "two-part":
                tune_two_part(work, watch)
            else:
                tune_u_shape(work, watch)
        job.mark("tuned")
    else:
        watch.reached = steps
    seconds = time.perf_counter() - begin
    losses = job.losses()
    return SplitTuning(
        path=job.path,
        partition=job.record.partition,
        names=job.record.names,
        losses=tuple(losses[number] for number in sorted(losses)),
        steps=steps,
        resumed_from=watch.reached,
        tokens=watch.tokens,
        tokens_per_second=watch.tokens / seconds,
        bytes_sent=work.traffic.sent,
        bytes_received=work.traffic.received,
        privacy=statement,
        seconds=seconds,
    )
