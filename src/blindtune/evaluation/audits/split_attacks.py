"""The attacks that fit what a vendor saw of a customer's texts, run one after another.

The attacker learns from most of its public text and rehearses on the rest: it noises those texts
itself and sees how far its prior of the language may be trusted (`attacks.language_prior`).

Shapes: L length, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from blindtune.attacks.adversary import Candidates, Guess, StatesView, unigram
from blindtune.attacks.attribute_inference import AttributeConfig, infer_attribute
from blindtune.attacks.dummy_embeddings import DummyConfig, tokens_by_dummies
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.attacks.fitting import FitConfig
from blindtune.attacks.gradient_matching import filled
from blindtune.attacks.imitation import Imitation
from blindtune.attacks.language_prior import JointPrior, NgramPrior, Prior, best_weight, decode
from blindtune.attacks.likelihoods import (
    commonest_members,
    group_candidates,
    token_candidates,
    vector_candidates,
)
from blindtune.attacks.trained_inversion import (
    Inverter,
    InverterConfig,
    candidates,
    train_inverter,
)
from blindtune.errors import ConfigError
from blindtune.evaluation.audits import draws_attack, gradient_attacks
from blindtune.evaluation.audits.attribute_attack import ATTACK, KnownAttribute
from blindtune.evaluation.audits.audit import AuditConfig, NotRun
from blindtune.evaluation.audits.language_attack import weighed
from blindtune.evaluation.audits.split_subject import SplitSubject
from blindtune.models.margins import Margins

FEWEST_PUBLIC = 20
"""Texts, below which nothing is learned."""
REHEARSED = 24
"""Public texts, at most, on which the attacker rehearses."""
KEPT = 16
"""Candidates of a token."""
EPOCHS = 1000
"""Of an attack's training, at most: the seconds that it is given end it, or that it has settled."""
ENDED = "Training of a network was ended by --attack-seconds: a longer one may read more."
LEARNED = "trained inverter"
"""The attack that every audit with public text enough runs."""
TRIGRAMS = "weighed by trigrams of public text"
MODEL = "weighed by a causal language model and these trigrams together"
Told = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Attempt:
    """What one attack read."""

    attack: str
    knew: str
    """One sentence: what the attacker had and did."""
    guess: Guess
    real: bool = True
    """False: not something that this vendor could do; for comparison."""
    note: str = ""
    """A sentence on how far to trust it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Equipment:
    """What the attacker has and does beyond what every audit runs; see `AdversaryConfig`."""

    prior: Prior | None = None
    attribute: KnownAttribute | None = None
    """Of the public texts that the attacks are given."""
    dummies: bool = False
    windows: bool = False
    """Whether the texts are windows of a language model, which have no attribute."""


@final
class SplitAttacks:
    """Runs what fits.

    Args:
        subject: the states; nothing else of it is given to an attack.
        public: token ids [L] of public texts; fewer than `FEWEST_PUBLIC`: what needs them is not
            run.
        config: how hard to try.
        told: called with (attack, done, of all).
        offered: public texts that there were before `public_tokens` chose from them.
        equipment: what was asked for.

    Attributes:
        attempts, not_run: what was run, and what was not and why.
        attribute_N: the attribute of every text as it was guessed; None: it was not.
        attribute_note: a sentence on how far to trust that.
        learns: whether attacks that learn from public text were run.
        settled: whether every training of an attack ended by itself.
    """

    def __init__(
        self,
        subject: SplitSubject,
        public: Sequence[Tensor],
        config: AuditConfig,
        told: Told,
        *,
        offered: int,
        equipment: Equipment | None = None,
    ) -> None:
        self._subject, self._config, self._told = subject, config, told
        self._equipment = equipment or Equipment()
        self._public = tuple(public)
        self.attribute_N: Tensor | None = None
        self.attribute_note = ""
        self.attempts: list[Attempt] = []
        self.not_run: list[NotRun] = []
        count = min(REHEARSED, len(public) // 5)
        enough = len(public) >= FEWEST_PUBLIC
        self._rehearsed = tuple(public[:count]) if enough else ()
        self._learned = tuple(public[count:]) if enough else ()
        self._view = StatesView(
            model=subject.bottom.stack, cut=subject.bottom.cut.cut, states=subject.states,
            mechanism=subject.mechanism, spared=subject.spared, groups=subject.groups,
            public=self._learned,
            margins=subject.bottom.margins if subject.keeps_special else Margins(),
        )  # fmt: skip
        self._needs = public_needed(len(public), offered, config.public_tokens)
        self._inverters: dict[bool, Inverter] = {}
        self.learns = bool(self._learned)
        self.settled = True

    def run(self) -> None:
        """Fill `attempts` and `not_run`."""
        steps: list[tuple[str, Callable[[], None]]] = [("nearest neighbour", self._nearest)]
        equipment = self._equipment
        if self._learned:
            steps.append((LEARNED, self._inverter))
            steps += self._by_mechanism()
            steps.append(("guessing", self._guessing))
            if equipment.attribute is not None and equipment.attribute.count >= FEWEST_PUBLIC:
                steps.append((ATTACK, self._attribute))
            elif equipment.attribute is not None:
                self.not_run.append(
                    NotRun(attack=ATTACK, needs=_values_needed(equipment.attribute))
                )
        else:
            names = [LEARNED, "trigrams", *(name for name, _ in self._by_mechanism())]
            names += ["language model"] if equipment.prior is not None else []
            names += [ATTACK] if equipment.attribute is not None else []
            self.not_run += [NotRun(attack=name, needs=self._needs) for name in names]
        if equipment.dummies:
            steps.append(("dummy embeddings", self._dummies))
        if self._subject.gives_text_by_gradients:
            steps.append(("gradients", self._gradients))
        if self._subject.predicted is not None:
            steps.append(("gradients of the tuning", self._gradients_of_tuning))
        if any(self._subject.again):
            steps.append(("draws that were sent", self._sent_again))
        if self._subject.redraw is not None and self._config.fresh_draws > 1:
            steps.append(("fresh draws", self._fresh))
        for done, (name, step) in enumerate(steps):
            self._told(name, done, len(steps))
            step()
        self._told("attacked", len(steps), len(steps))
        self.not_run += self._not_asked()

    def _not_asked(self) -> Iterator[NotRun]:
        """What an option would add."""
        equipment = self._equipment
        more = "" if self._learned else f"; and {self._needs}"
        if self._view.cut and not equipment.dummies:
            yield NotRun(attack="dummy embeddings", needs="--dummies, and seconds a text")
        if equipment.prior is None:
            needs = "--prior, a causal language model; trigrams stand for it"
            yield NotRun(attack="language model", needs=f"{needs}{more}")
        if equipment.attribute is None and not equipment.windows:
            needs = "--attribute-column, a column of --data and --public"
            if not self._subject.places:
                needs += ": a job has no --data, audit its bottom package"
            yield NotRun(attack=ATTACK, needs=f"{needs}{more}")

    def _by_mechanism(self) -> list[tuple[str, Callable[[], None]]]:
        if self._subject.groups is not None:
            bayes = [] if self._subject.mechanism is None else [("Bayes", self._bayes)]
            return [("word of the group", self._group), *bayes]
        if self._subject.mechanism is None or self._subject.mechanism.mode == "block-output":
            return []
        if self._subject.mechanism.replaces_words:
            return [("Bayes", self._bayes)]
        return [] if self._view.cut else [("noise density", self._density)]

    @cached_property
    def _words_view(self) -> StatesView:
        """What tells most about the words that were sent.

        Where a language model learns to predict these, its gradients give them behind any cut; they
        tell as much as states at the embedding do. Recorded gradients are read; where they are
        silent, the states are.
        """
        subject, view = self._subject, self._view
        if not subject.predicts_sent:
            return view
        sent = subject.predicted
        if subject.gives_text_by_gradients:
            sent = filled(self._by_gradients, self._sent(view))
        if sent is None:
            return view
        return replace(view, cut=0, states=tuple(Imitation(view.model, 0).states(sent)))

    @cached_property
    def _by_gradients(self) -> Guess:
        """What recorded gradients give, `NO_GUESS` where they are silent."""
        return gradient_attacks.tokens_of(self._subject)

    @cached_property
    def _read_states(self) -> tuple[str, Guess]:
        """Which attack reads states best where no noise is in the way, and its guess."""
        if self._learned:
            return LEARNED, candidates(self._trained(adaptive=True), self._view.states).first()
        return "nearest neighbour", nearest_tokens(self._view)

    def _nearest(self) -> None:
        self._add(
            "nearest neighbour",
            "Had the states and the model; took for each state the word whose embedding lies "
            "nearest.",
            nearest_tokens(self._view),
            note="Behind blocks a high EP of this attack alone says nothing."
            if self._view.cut
            else "",
        )

    def _inverter(self) -> None:
        knew = (
            f"Had {len(self._learned):,} public texts too; made states of them as you do and "
            "trained a network to read them"
        )

        def read(view: StatesView) -> Candidates:
            return candidates(self._trained(adaptive=True), view.states, KEPT)

        self._both(LEARNED, knew, read, trained=True)

    def _bayes(self) -> None:
        knew = (
            "Knew the noise and how frequent words are in public text; computed, or drew the noise "
            "itself to see, which words come out as those that were sent"
        )
        if self._view.spared is not None:
            knew += "; knew how many tokens contribute, and not which"
        self._both(
            "Bayes",
            knew,
            lambda view: token_candidates(view, self._sent(view)),
            view=self._words_view,
        )

    def _density(self) -> None:
        knew = (
            "Knew the noise and how frequent words are in public text; took the word from which "
            "the state is likeliest by the noise's own density"
        )
        try:
            self._both("noise density", knew, lambda view: vector_candidates(view, KEPT))
        except ConfigError:
            needs = "a model that sends its word embeddings as they are, or through a layer norm"
            self.not_run.append(NotRun(attack="noise density", needs=needs))

    def _group(self) -> None:
        groups = self._subject.groups
        assert groups is not None
        knew = (
            "Read which group each token is of, and took the group's word that public text has "
            "most often"
        )
        prior_V = unigram(self._learned, len(self._view.table_VD))
        members = commonest_members(groups, prior_V, KEPT)
        self._both(
            "word of the group", knew,
            lambda view: group_candidates(members, self._sent(view), KEPT),
            view=self._words_view,
        )  # fmt: skip

    def _gradients(self) -> None:
        name, states = self._read_states
        self._add(
            "gradients",
            f"{gradient_attacks.KNEW_TOKENS}{name}.",
            filled(self._by_gradients, states),
        )

    def _gradients_of_tuning(self) -> None:
        predicted = self._subject.predicted
        assert predicted is not None
        self._add("gradients of the tuning", gradient_attacks.KNEW_TUNING, predicted)

    def _dummies(self) -> None:
        """Start from the inverter where there is public text to train it on."""
        name, start = self._read_states
        config = DummyConfig(limit_seconds=self._config.attack_seconds)
        guess, done = tokens_by_dummies(self._view, start, config)
        note = ""
        if done < len(guess):
            note = f"--attack-seconds ended it after {done:,} of {len(guess):,} texts; the others "
            note += f"are the {name}'s, or words on the way that explain the states better."
        groups = self._subject.groups
        if groups is not None:
            # The search ends at the words that groups send; which of a group, the start says.
            guess = tuple(
                torch.where(groups.apply(found) == groups.apply(begun), begun, found)
                for found, begun in zip(guess, start, strict=True)
            )
        if self._view.mechanism is not None or groups is not None:
            note = f"It finds the words that were sent, not those that were meant. {note}".rstrip()
        self._add(
            "dummy embeddings",
            f"Had the states and the model; began with the {name}'s words and moved their "
            "embeddings until the bottom makes the states of them.",
            guess,
            note,
        )

    def _attribute(self) -> None:
        known, config = self._equipment.attribute, self._config
        assert known is not None
        some = (known.classes_N >= 0).nonzero()[:, 0].tolist()
        view = replace(self._view, public=tuple(self._public[i] for i in some))
        fit = FitConfig(
            epochs=EPOCHS, batch_size=32, patience=8, limit_seconds=config.attack_seconds,
            seed=config.seed,
        )  # fmt: skip
        guess_N, result = infer_attribute(view, known.classes_N[some], AttributeConfig(fit=fit))
        self.attribute_N = guess_N
        self.attribute_note = "" if result.settled else ENDED
        self.settled = self.settled and result.settled

    def _guessing(self) -> None:
        content = [self._subject.bottom.margins.content(text) for text in self._learned]
        word = int(unigram(content, len(self._view.table_VD)).argmax())
        self.attempts.append(
            Attempt(
                attack="guessing, no attack",
                knew="Looked at nothing, and said the commonest word of the public text each time.",
                guess=tuple(torch.full((length,), word) for length in self._view.lengths),
                real=False,
            )
        )

    def _sent_again(self) -> None:
        """Average what was sent of each text, and read the others from their one draw."""
        view, again = self._view, self._subject.again
        guess: dict[int, Tensor] = {}
        for more in {len(draws) for draws in again}:
            some = [i for i, draws in enumerate(again) if len(draws) == more]
            first = replace(view, states=tuple(view.states[i] for i in some))
            rest = [[again[i][k] for i in some] for k in range(more)]
            guess |= zip(some, self._of_draws(first, rest), strict=True)
        draws, texts = self._subject.drawn_again
        self._add(
            f"averaging {draws:,} draws of {texts:,} texts",
            f"Had {draws:,} draws of {texts:,} texts, which stand more than once in the data or in "
            "a file that is predicted; was told which are of one text, and read "
            f"{draws_attack.KNEW}. The other texts it read from their one draw.",
            tuple(guess[i] for i in range(len(again))),
        )

    def _fresh(self) -> None:
        assert self._subject.redraw is not None
        count = self._config.fresh_draws
        again = [self._subject.redraw() for _ in range(count - 1)]
        knew = (
            f"Would have {count} independent draws of the same texts, and read {draws_attack.KNEW}."
        )
        if not any(self._subject.again):
            knew += " You send one draw, however many epochs there are."
        self.attempts.append(
            Attempt(
                attack=f"{count} fresh draws, never sent",
                knew=knew,
                guess=self._of_draws(self._view, again),
                real=False,
            )
        )

    def _of_draws(self, view: StatesView, again: Sequence[Sequence[Tensor]]) -> Guess:
        return draws_attack.read_draws(
            view, again, one=self._of_one, sent=self._sent,
            rehearse=lambda: self._rehearsal(view), known=self._rehearsed,
        )  # fmt: skip

    def _of_one(self, view: StatesView) -> Guess:
        """Read states that are a draw, or the mean of several."""
        if not view.cut or not self._learned:
            return nearest_tokens(view)
        return candidates(self._trained(adaptive=True), view.states).first()

    def _both(
        self,
        attack: str,
        knew: str,
        read: Callable[[StatesView], Candidates],
        view: StatesView | None = None,
        *,
        trained: bool = False,
    ) -> None:
        """An attack by itself and with a prior of the language, after a rehearsal.

        Behind a cut every attack reads by a network that was `trained`.
        """
        view = view or self._view
        found, rehearsed = read(view), read(self._rehearsal(view))
        note = ENDED if (trained or view.cut) and not self.settled else ""
        self._add(attack, f"{knew}.", found.first(), note)
        weight = best_weight(rehearsed, self._rehearsed, self._trigrams)
        said = "" if weight else "The rehearsal gave trigrams no weight: likelihoods decided alone."
        guess = decode(found, self._trigrams, weight=weight)
        self._add(f"{attack}, trigrams", f"{knew}; then {TRIGRAMS}.", guess, f"{note} {said}")
        if self._equipment.prior is not None:
            prior = JointPrior(self._equipment.prior, self._trigrams)
            guess, said = weighed(
                found, rehearsed, self._rehearsed, prior, self._config.attack_seconds
            )
            self._add(
                f"{attack}, language model", f"{knew}; then {MODEL}.", guess, f"{note} {said}"
            )

    @cached_property
    def _trigrams(self) -> NgramPrior:
        return NgramPrior(self._learned, len(self._view.table_VD))

    def _rehearsal(self, view: StatesView) -> StatesView:
        """The attacker's own texts as this customer would send them."""
        return replace(view, states=tuple(Imitation.of(view).states(self._rehearsed)))

    def _sent(self, view: StatesView) -> Guess:
        """The tokens that went into the bottom, after noise or grouping."""
        if not view.cut:
            return nearest_tokens(view)
        return candidates(self._trained(adaptive=False), view.states).first()

    def _trained(self, *, adaptive: bool) -> Inverter:
        if adaptive not in self._inverters:
            groups, config = self._subject.groups, self._config
            learned = self._learned
            if groups is not None and not adaptive:
                learned = tuple(groups.apply(ids, self._view.margins.mask(ids)) for ids in learned)
            fit = FitConfig(epochs=EPOCHS, limit_seconds=config.attack_seconds, seed=config.seed)
            inverter, result = train_inverter(
                replace(self._view, public=learned),
                InverterConfig(adaptive=adaptive, fit=fit),
            )
            self._inverters[adaptive] = inverter
            self.settled = self.settled and result.settled
        return self._inverters[adaptive]

    def _add(self, attack: str, knew: str, guess: Guess, note: str = "") -> None:
        self.attempts.append(Attempt(attack=attack, knew=knew, guess=guess, note=note.strip()))


def public_needed(left: int, offered: int, tokens: int) -> str:
    """What attacks that learn need, where too few public texts were left."""
    if not offered:
        return f"--public, with at least {FEWEST_PUBLIC} texts of the kind that yours are"
    if offered < FEWEST_PUBLIC:
        return f"{FEWEST_PUBLIC} public texts, --public holds {offered}: give more"
    return (
        f"{FEWEST_PUBLIC} public texts, {left} were left within --public-tokens {tokens}: raise it"
    )


def _values_needed(known: KnownAttribute) -> str:
    """What attribute inference needs, where too few public texts have a value."""
    return (
        f"{FEWEST_PUBLIC} public texts with a value of {known.column!r}, {known.count} of "
        f"{len(known.classes_N)} have one: give more, or raise --public-tokens"
    )
