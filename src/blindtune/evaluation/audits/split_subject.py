"""What an audit of split tuning looks at: the states that a vendor gets, beside the truth.

Three subjects: a bottom package, whose customer wants to know before the first run (a sample of the
texts is privatized here as a run would do it, and thrown away); a customer's job, whose states were
drawn already; a recorded transcript of what crossed. The truth of a transcript is in the customer's
own texts: each text that was tuned on is taken for one of them (`evaluation.leakage.owners`). Only
a judge can do that.

Shapes: L length, D hidden, N texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from blindtune.attacks.adversary import Spared
from blindtune.attacks.observation import SeenTexts, seen_gradients, seen_texts
from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.leakage.empirical_privacy import contributing_masks
from blindtune.evaluation.leakage.owners import Owners, owners_of
from blindtune.exchange.packages.signing import Trust
from blindtune.exchange.wire.transcript import Transcript, open_transcript
from blindtune.places import data_source, located
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.bottom import Bottom, open_bottom
from blindtune.split.customer.job import MARK, CustomerJob
from blindtune.split.customer.own_groups import make_groups
from blindtune.split.customer.privacy_statement import (
    PrivacyStatement,
    choose_eta,
    state_privacy,
)
from blindtune.split.customer.private_gradients import GradientPlan
from blindtune.split.customer.private_states import PrivateStates, privatize
from blindtune.split.customer.private_texts import (
    PrivateTexts,
    ReadingConfig,
    cut_texts,
    read_unseen,
)
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.training.text import DataConfig, read_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """A text's backward passes in a recorded U-shape."""

    output_LD: Tensor
    """What the vendor's trunk gave in the first."""
    last_LD: Tensor
    """The same in the last, which knows most of the classes."""
    gradient_LD: Tensor
    """What the customer sent for it."""
    all_LD: Tensor
    """The sum of what it sent in all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenLabels:
    """The classes of texts, and what a vendor is told of them."""

    true_N: Tensor
    """For the judge alone."""
    told_N: Tensor | None = None
    """As they cross, or as the gradients of a U-shape will tell them; None: gradients were
    recorded, which are read instead."""
    epsilon: float | None = None
    """At which they were drawn anew; None: they are told as they are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitSubject:
    """Some texts of a customer, as the vendor sees them and as they are."""

    bottom: Bottom
    states: tuple[Tensor, ...]
    """[L, D] of every text: what the vendor gets."""
    ids: tuple[Tensor, ...]
    """[L] of the same texts: the truth."""
    mechanism: Mechanism | None
    """The noise, which is announced; None: none."""
    groups: WordGroups | None
    contributing: tuple[Tensor, ...] | None
    """Masks [L] of the tokens that CTI spares; None without CTI."""
    cti_factor: float
    """Of their noise."""
    keeps_special: bool
    """Whether the tokens around a text are sent without noise."""
    statement: PrivacyStatement
    redraw: Callable[[], Sequence[Tensor]] | None
    """Noises the same texts anew; nothing of it leaves. None where nothing is drawn."""
    facts: Mapping[str, str]
    """About texts and states, for the reader."""
    again: tuple[tuple[Tensor, ...], ...] = ()
    """Of every text, further draws [L, D] of the same words, that the vendor gets too: the text
    stands twice in its file, or in one that is predicted. Empty where nothing is drawn."""
    passes: tuple[Pass | None, ...] = ()
    """Of every text, None where none was recorded; empty where no gradient was."""
    labels: SeenLabels | None = None
    """Of the texts, where there is something to learn of them: gradients of a classification were
    recorded, or labels are drawn anew."""
    predicted: tuple[Tensor, ...] | None = None
    """[L] of every text: what a language model is tuned to predict, so that its gradients will give
    it away. None for other tasks, and for transcripts, which have the gradients or none."""
    windows: bool = False
    """Whether the texts are a language model's windows, which begin anywhere."""
    predicts_sent: bool = False
    """Whether what is predicted are the words that were sent, and not the true ones."""
    places: tuple[int, ...] = ()
    """Which text of the customer's file each is, from 0; empty where there is no file."""

    @property
    def spared(self) -> Spared | None:
        """What is taken to be known of the tokens that CTI spares."""
        if self.contributing is None:
            return None
        content = [~self.bottom.margins.mask(ids_L) for ids_L in self.ids]
        share = float(torch.cat([
            mask_L[content_L] for mask_L, content_L in zip(self.contributing, content, strict=True)
        ]).double().mean())  # fmt: skip
        return Spared(share=share, factor=self.cti_factor) if 0 < share < 1 else None

    @property
    def drawn_again(self) -> tuple[int, int]:
        """How many different draws there are of how many different texts, of those with several."""
        pairs = zip(self.ids, self.again, strict=True) if self.again else ()
        several = {_name(ids_L): 1 + len(draws) for ids_L, draws in pairs if draws}
        return sum(several.values()), len(several)

    @property
    def gives_text_by_gradients(self) -> bool:
        """Whether steps of tuning a language model were recorded."""
        return bool(self.passes) and self.labels is None


def open_subject(
    subject: str | Path,
    *,
    bottom: str | Path | None,
    data: str | Path | None,
    privatizer: PrivatizerConfig | None,
    reading: ReadingConfig,
    tokens: int,
    trust: Trust | None,
) -> SplitSubject:
    """Open whatever it is; see `audit_split` for the arguments and errors."""
    place = located(subject)
    if (place / MARK).exists():
        if data is not None or privatizer not in (None, PrivatizerConfig()):
            raise ConfigError(f"{place}: a job has its texts and its privatizer: leave both")
        return _job(place, bottom, tokens, trust)
    transcript = None if place.is_dir() else open_transcript(place)
    if transcript is None and bottom is not None:
        raise ConfigError(f"{place}: expected a job or a transcript with bottom: leave it")
    package = open_bottom(_needed(bottom if transcript else place, "bottom"), trust=trust)
    privatizer = privatizer or PrivatizerConfig()
    privatizer.check_whole()
    privatizer = privatizer.for_task(reading.task, package.cut.partition)
    texts = read_audited(package, _needed(data, "data"), reading)
    if privatizer.cti_fraction and texts.labels is None:
        raise ConfigError("expected labelled texts with cti_fraction, got texts alone: leave CTI")
    eta = choose_eta(package, texts.ids, privatizer)
    grouping = privatizer.grouping()
    groups = None
    if grouping is not None and privatizer.public_text is not None:
        groups = make_groups(package, privatizer.public_text, grouping)
    made = _Making(package, privatizer, eta, groups, len(texts.names))
    facts = {"texts": f"{len(texts.ids):,} in {Path(_needed(data, 'data')).name}"}
    language_model = reading.task == "language-model"
    if transcript is not None:
        return _recorded(made, transcript, texts, tokens, facts, language_model=language_model)
    return _drawn(made, texts, tokens, facts, language_model=language_model)


def read_audited(bottom: Bottom, path: str | Path, reading: ReadingConfig) -> PrivateTexts:
    """Texts with their labels if every row has one, or without; of .txt every line is a text.

    Raises:
        DataError, ConfigError: as for `read_unseen`.
    """
    if reading.task != "language-model" and Path(data_source(path)).suffix.lower() == ".txt":
        rows = [str(row["text"]) for _, row in read_rows(str(path), DataConfig())]
        lines = [line for text in rows for line in text.splitlines() if line.strip()]
        ids, shortened = cut_texts(bottom, lines, reading)
        return PrivateTexts(ids=ids, labels=None, shortened=shortened)
    return read_unseen(bottom, path, reading)


def spread_texts(ids: Sequence[Tensor], tokens: int) -> list[int]:
    """Indices of texts, spread evenly, that hold about so many tokens; at least two if there are.

    The number follows from the mean length.
    """
    mean = sum(map(len, ids)) / len(ids)
    count = min(len(ids), max(2, int(tokens / mean)))
    return [i * len(ids) // count for i in range(count)]


@dataclass(frozen=True)
class _Making:
    """How a customer makes states of texts."""

    bottom: Bottom
    privatizer: PrivatizerConfig
    eta: float | None
    groups: WordGroups | None
    classes: int
    gradients: GradientPlan | None = None
    """The noise on a job's gradients."""

    def draw(
        self, ids: Sequence[Tensor], labels: Tensor | None, *, predict_sent: bool = False
    ) -> PrivateStates:
        importance = self.privatizer.importance()
        if labels is None:  # as texts that are only predicted, which spare none
            importance = replace(importance, fraction=0.0)
        return privatize(
            self.bottom, ids, labels, mechanism=self.privatizer.mechanism(self.eta),
            importance=importance, groups=self.groups, classes=self.classes,
            label_epsilon=None if labels is None else self.privatizer.label_epsilon,
            predict_sent=predict_sent,
        )  # fmt: skip

    def subject(
        self,
        texts: PrivateTexts,
        some: Sequence[int],
        states: Sequence[Tensor],
        changed: float | None,
        facts: Mapping[str, str],
        sent: Iterable[tuple[Tensor, Tensor]],
    ) -> SplitSubject:
        """The states of some texts as a subject; CTI counts in all of them.

        `sent` has the ids and states of everything that the vendor gets: further draws too.
        """
        masks = self._contributing(texts)
        mechanism = self.privatizer.mechanism(self.eta)

        def redraw() -> list[Tensor]:
            if masks is not None:
                again = self.draw(texts.ids, texts.labels).states
                return [again[i] for i in some]
            labels = None if texts.labels is None else texts.labels[list(some)]
            return list(self.draw([texts.ids[i] for i in some], labels).states)

        private = PrivateStates(tuple(states), texts.labels, texts.ids, changed)
        statement = state_privacy(
            self.bottom, private, self.privatizer, self.eta, groups=self.groups,
            classes=self.classes, gradients=self.gradients, shortened=texts.shortened,
        )  # fmt: skip
        ids = tuple(texts.ids[i] for i in some)
        count = f"{len(some):,} texts with {sum(map(len, ids)):,} tokens"
        return SplitSubject(
            bottom=self.bottom,
            states=tuple(states),
            ids=ids,
            mechanism=mechanism,
            groups=self.groups,
            contributing=None if masks is None else tuple(masks[i] for i in some),
            cti_factor=self.privatizer.cti_factor,
            keeps_special=self.privatizer.special == "keep",
            statement=statement,
            redraw=None if mechanism is None else redraw,
            facts={**facts, "attacked": count},
            again=() if mechanism is None else _further(ids, states, sent),
        )

    def _contributing(self, texts: PrivateTexts) -> list[Tensor] | None:
        if not self.privatizer.cti_fraction or texts.labels is None:
            return None
        table = self.bottom.stack.embedding.weight
        assert isinstance(table, Tensor)
        return contributing_masks(
            texts.ids, texts.labels, self.bottom.margins, self.privatizer.importance(),
            classes=self.classes, vocabulary_size=len(table),
        )  # fmt: skip


def _drawn(
    made: _Making,
    texts: PrivateTexts,
    tokens: int,
    facts: Mapping[str, str],
    *,
    language_model: bool,
) -> SplitSubject:
    """A sample, noised as a run would; with CTI, which counts in all texts, all of them are."""
    predict_sent = language_model and made.privatizer.targets == "sent"
    some = spread_texts(texts.ids, tokens)
    places = tuple(some)
    if not made.privatizer.cti_fraction:
        labels = None if texts.labels is None else texts.labels[some]
        texts = replace(texts, ids=tuple(texts.ids[i] for i in some), labels=labels)
        some = list(range(len(some)))
    private = made.draw(texts.ids, texts.labels, predict_sent=predict_sent)
    states = [private.states[i] for i in some]
    sent = zip(private.ids, private.states, strict=True)
    found = made.subject(texts, some, states, private.changed, facts, sent)
    told = _told(made, texts.labels, private.labels, some)
    found = replace(found, places=places, labels=told)
    return _predicting(found, private, some) if language_model else found


def _told(
    made: _Making, true: Tensor | None, told: Tensor | None, some: Sequence[int]
) -> SeenLabels | None:
    """Some texts' labels that were drawn anew; None where they are told as they are, or not."""
    epsilon = made.privatizer.label_epsilon
    if true is None or told is None or epsilon is None:
        return None
    chosen = list(some)
    return SeenLabels(true_N=true[chosen], told_N=told[chosen], epsilon=epsilon)


def _further(
    ids: Sequence[Tensor], states: Sequence[Tensor], sent: Iterable[tuple[Tensor, Tensor]]
) -> tuple[tuple[Tensor, ...], ...]:
    """Of each text the different states that were sent of the same ids, less its own."""
    draws: dict[bytes, list[Tensor]] = {_name(text): [] for text in ids}
    for text, state in sent:
        kept = draws.get(_name(text))
        if kept is not None and not any(torch.equal(state, known) for known in kept):
            kept.append(state)
    return tuple(
        tuple(state for state in draws[_name(text)] if not torch.equal(state, own))
        for text, own in zip(ids, states, strict=True)
    )


def _name(ids_L: Tensor) -> bytes:
    return ids_L.numpy().tobytes()


def _predicting(found: SplitSubject, private: PrivateStates, some: Sequence[int]) -> SplitSubject:
    """With what a language model is tuned to predict, where its gradients will give it away."""
    return replace(
        found,
        windows=True,
        predicted=None
        if found.statement.gradients is not None
        else tuple(private.targets[i] for i in some),
        predicts_sent=private.sent_ids is not None,
    )


def _job(place: Path, bottom: str | Path | None, tokens: int, trust: Trust | None) -> SplitSubject:
    """The states that a job has drawn: what it sends."""
    job = CustomerJob(place)
    package = open_bottom(bottom or job.record.bottom_path, trust=trust)
    if package.id != job.record.bottom:
        raise ConfigError(
            f"{place}: expected the bottom package {job.record.bottom[:12]}..., got "
            f"{package.id[:12]}...: name the job's own as --bottom"
        )
    private = job.states()
    if private is None:
        raise DataError(f"{place}: the job has no states yet: audit the bottom package instead")
    privatizer = job.config(PrivatizerConfig, "privatizer")
    language_model = job.config(ReadingConfig, "reading").task == "language-model"
    stated = job.statements().get("tuning")
    made = _Making(
        package, privatizer, job.record.eta, job.groups(), len(job.record.names),
        gradients=None if stated is None else stated.gradients,
    )  # fmt: skip
    facts = {"texts": f"{len(private):,} of the job", "states": "those that the job sends"}
    texts = PrivateTexts(ids=private.ids, labels=private.labels)
    asked = [pair for some in job.asked() for pair in zip(some.ids, some.states, strict=True)]
    known = {_name(text) for text in private.ids}
    if others := len({_name(text) for text, _ in asked} - known):
        facts["left out"] = _only_predicted(others)
    some = spread_texts(texts.ids, tokens)
    states = [private.states[i] for i in some]
    sent = [*zip(private.ids, private.states, strict=True), *asked]
    found = made.subject(texts, some, states, private.changed, facts, sent)
    return _predicting(found, private, some) if language_model else found


def _recorded(
    made: _Making,
    transcript: Transcript,
    texts: PrivateTexts,
    tokens: int,
    facts: Mapping[str, str],
    *,
    language_model: bool,
) -> SplitSubject:
    """What crossed, each text beside the one that it is taken for."""
    seen = seen_texts(transcript)
    width = made.bottom.hidden_size
    if any(state.shape[1] != width for state in seen.states):
        raise DataError(f"expected states of width {width}, got others: name their bottom package")
    if not any(seen.tuned):
        raise DataError(
            f"expected a transcript of a tuning, got {len(seen.tuned):,} texts that were only "
            "predicted: audit the bottom package with them as --data"
        )
    drawn = made.privatizer.mechanism(made.eta) is not None
    owners = owners_of(made.bottom, made.groups, texts.ids, seen, drawn=drawn)
    if not owners.own:
        raise DataError(
            "expected the texts that crossed, got texts of other lengths: give --data, "
            "--text-column and --max-length of the run"
        )
    known = sorted(owners.own)
    places = [known[k] for k in spread_texts([seen.states[i] for i in known], tokens)]
    some = [owners.own[i] for i in places]
    states = [seen.states[i] for i in places]
    facts = {**facts, **_facts_of(seen, owners)}
    sent = [(texts.ids[k], seen.states[i]) for i, k in (owners.own | owners.again).items()]
    subject = made.subject(texts, some, states, None, facts, sent)
    passes = _passes(transcript, seen, places)
    if passes and not language_model and (texts.labels is None or texts.labels.is_floating_point()):
        passes = ()  # nothing to compare a guess with
    predicts_sent = language_model and made.privatizer.targets == "sent"
    return replace(
        subject,
        passes=passes,
        labels=None if language_model else _crossed(made, texts, some, seen, places, bool(passes)),
        predicts_sent=predicts_sent and bool(passes),
        places=tuple(some),
    )


def _crossed(
    made: _Making,
    texts: PrivateTexts,
    some: Sequence[int],
    seen: SeenTexts,
    places: Sequence[int],
    gradients: bool,
) -> SeenLabels | None:
    """Of texts whose gradients were recorded, or whose labels crossed after they were drawn anew.

    `some` counts in the customer's file, `places` in what crossed.
    """
    if texts.labels is None or texts.labels.is_floating_point():
        return None
    true_N, epsilon = texts.labels[list(some)], made.privatizer.label_epsilon
    if gradients:
        return SeenLabels(true_N=true_N, epsilon=epsilon)
    told = [label for i in places if (label := seen.labels[i]) is not None]
    whole = len(told) == len(true_N)
    return _told(made, true_N, torch.stack(told), range(len(told))) if whole else None


def _passes(
    transcript: Transcript, seen: SeenTexts, places: Sequence[int]
) -> tuple[Pass | None, ...]:
    """The backward passes of each of these texts; empty if there is none at all."""
    passes: dict[int, Pass] = {}
    for step in seen_gradients(transcript, seen):
        for i, output_LD, gradient_LD in zip(step.texts, step.outputs, step.gradients, strict=True):
            known = passes.get(i) or Pass(
                output_LD=output_LD, last_LD=output_LD, gradient_LD=gradient_LD,
                all_LD=torch.zeros_like(gradient_LD),
            )  # fmt: skip
            passes[i] = replace(known, last_LD=output_LD, all_LD=known.all_LD + gradient_LD)
    found = tuple(passes.get(i) for i in places)
    return found if any(found) else ()


def _facts_of(seen: SeenTexts, owners: Owners) -> dict[str, str]:
    found = {
        "crossed": f"{len(seen.states):,} different texts, {sum(seen.times):,} in all",
        "truth": "the texts of --data, one for each that was tuned on: of equal length, all "
        "together as near as can be",
    }
    if owners.again:
        found["drawn again"] = (
            f"{len(owners.again):,} of them are taken for other draws of these texts, as near to "
            "one as the noise leaves its own"
        )
    lost = [i for i in range(len(seen.states)) if i not in owners.own and i not in owners.again]
    tuned = sum(seen.tuned[i] for i in lost)
    left = [f"{tuned:,} texts that were tuned on and have none in --data are left out"]
    left = left[:tuned] + [_only_predicted(len(lost) - tuned)][: len(lost) - tuned]
    return found | ({"left out": "; ".join(left)} if left else {})


def _only_predicted(count: int) -> str:
    return f"{count:,} texts that were only predicted are left out"


def _needed(given: str | Path | None, name: str) -> str | Path:
    if given is None:
        raise ConfigError(f"expected --{name} for the audit of split tuning: see --help")
    return given
