"""How a customer's texts are privatized: every option that changes their privacy, in one place.

What gradients of the U-shape tell of labels and true words is in `private_gradients`.

Guarantee: none of its own; `privacy_statement` says what a choice spends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from blindtune.errors import ConfigError
from blindtune.exchange.wire.messages import Partition
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.randomized_response import MAX_EPSILON
from blindtune.privacy.token_importance import ImportanceConfig, SpecialPolicy
from blindtune.privacy.word_groups import GroupingConfig

PrivatizerName = Literal["auto", "token", "exponential", "vector", "block-output", "groups", "none"]
Predicted = Literal["sent", "true"]


@dataclass(frozen=True, kw_only=True)
class PrivatizerConfig:
    """How private texts are noised before anything leaves. Everything here changes privacy."""

    privatizer: PrivatizerName = "auto"
    """What is noised. groups: every word becomes its group's, a promise of another kind
    (docs/privacy.md), and no less accuracy than noise where attacks read as much; exponential (a
    word is drawn, the nearer the likelier), token (word embedding, then the nearest word: the same
    promise, at a far larger eta), vector (word embedding), block-output (states after the bottom);
    none: nothing, only with --unprotected. auto: groups where public_text is given, else
    exponential."""
    eta: float | None = None
    """Privacy per token, per unit of distance between embeddings; smaller is more private."""
    changed_share: float | None = None
    """Instead of eta: the share of your tokens that shall come out as others, such as 0.5."""
    cti_fraction: float = 0.0
    """Share of the vocabulary that contributes to each class and gets less noise in its training
    texts; 0 switches that off. Weakens the guarantee."""
    cti_factor: float = 0.0
    """Noise factor of contributing tokens: 1 is full noise, 0 sends them as they are."""
    clip_norm: float | None = None
    """Block-output only: states are shortened to this length first, which bounds what is spent."""
    public_text: str | None = None
    """A file of public text of the kind that yours is, for groups: words are counted in it."""
    wrong_guesses: float = 0.75
    """Groups only, how coarse: share of frequent words' tokens that a guess by frequency shall get
    wrong; rare words are in fours on average at 0.75, in twos at 0.6 and less."""
    special: SpecialPolicy = "keep"
    """Tokens that the tokenizer puts around every text: keep (not noised, their places are public)
    or noise (as any other)."""
    label_epsilon: float | None = None
    """Classes: labels are drawn anew, once, so that whatever leaves tells of each of them no more
    than this epsilon (randomized response: of two classes 88 % of the labels stay at 2, 73 % at 1).
    None: labels are as they are."""
    targets: Predicted = "sent"
    """Language modelling: what is to be predicted. sent: the words that were sent, so gradients
    give nothing else; true: your texts' own tokens, whose gradients give them to the vendor unless
    they have noise of their own."""
    unprotected: bool = False
    """Says that you mean it: without a privatizer the vendor can read nearly all of the texts."""

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if self.privatizer not in get_args(PrivatizerName):
            names = ", ".join(get_args(PrivatizerName))
            raise ConfigError(f"expected privatizer {names}, got {self.privatizer!r}")
        if self.privatizer == "auto":
            chosen = "exponential" if self.public_text is None else "groups"
            object.__setattr__(self, "privatizer", chosen)
        self._check_targets()
        self._check_unused()
        if (self.privatizer == "none") != self.unprotected:
            raise ConfigError(
                "privatizer none sends states that are nearly the text: give unprotected too if "
                "that is meant, and only then"
            )
        if self.privatizer == "none":
            given = (self.eta, self.changed_share, self.clip_norm, self.public_text)
            if self.cti_fraction or any(value is not None for value in given):
                raise ConfigError(
                    "without a privatizer there is no eta, changed_share, clip_norm, public_text "
                    "or CTI: leave them out"
                )
            self.importance()
            return
        self._check_groups()
        if self.eta is not None and self.changed_share is not None:
            raise ConfigError("expected eta or changed_share, which chooses eta, got both")
        if self.changed_share is not None and not 0 < self.changed_share < 1:
            raise ConfigError(f"expected changed_share between 0 and 1, got {self.changed_share}")
        if self.privatizer == "block-output" and (self.changed_share or self.cti_fraction):
            raise ConfigError(
                "in block-output mode no token changes and none can be spared: give eta, and "
                "neither changed_share nor cti_fraction"
            )
        self.importance()
        self.mechanism(1.0 if self.eta is None else self.eta)

    def for_task(self, task: str, partition: Partition) -> PrivatizerConfig:
        """The same for texts of a task: where no words are predicted, `targets` says true.

        Raises:
            ConfigError: an option does not fit the task.
        """
        if self.cti_fraction and task != "classification":
            raise ConfigError(
                f"contributing tokens tell classes apart, and {task} has none: leave cti_fraction "
                "at 0"
            )
        if self.label_epsilon is not None and task != "classification":
            raise ConfigError(
                f"labels are drawn anew among classes, and {task} has none: leave label_epsilon"
            )
        if task != "language-model":
            return replace(self, targets="true")
        vectors = self.privatizer in ("vector", "block-output")
        if self.targets == "sent" and vectors and partition == "u-shape":
            raise ConfigError(
                f"privatizer {self.privatizer} sends no words that could be predicted: take "
                "exponential, token or groups, or say targets true (--targets true), whose "
                "gradients give your texts to the vendor"
            )
        return self

    def _check_targets(self) -> None:
        if self.label_epsilon is not None and not 0 < self.label_epsilon <= MAX_EPSILON:
            raise ConfigError(
                f"expected label_epsilon above 0 and at most {MAX_EPSILON:g}, got "
                f"{self.label_epsilon}: so much hides nothing, leave it out"
            )
        if self.label_epsilon is not None and self.cti_fraction:
            raise ConfigError(
                "expected label_epsilon or cti_fraction, got both: tokens would be spared by "
                "labels that are partly wrong"
            )
        if self.targets not in get_args(Predicted):
            raise ConfigError(f"expected targets sent or true, got {self.targets!r}")

    def _check_unused(self) -> None:
        """Refuse what is not as by default where nothing reads it."""
        if self.wrong_guesses != type(self).wrong_guesses and self.privatizer != "groups":
            raise ConfigError(
                "expected public_text with wrong_guesses, got none: word groups are made of it, "
                "and without them wrong_guesses says nothing; give it, or leave wrong_guesses"
            )
        if self.cti_factor != type(self).cti_factor and not self.cti_fraction:
            raise ConfigError(
                "expected cti_fraction above 0 with cti_factor, got 0, which spares no token: give "
                "a fraction, or leave cti_factor"
            )

    def _check_groups(self) -> None:
        if (self.privatizer == "groups") != (self.public_text is not None):
            raise ConfigError(
                "expected public_text with privatizer groups, and only then: words "
                "are counted in public text, because counts of private text would tell about it"
            )
        self.grouping()
        if self.privatizer == "groups" and (self.changed_share or self.cti_fraction):
            raise ConfigError(
                "with groups the share of tokens that change follows from wrong_guesses, and none "
                "is spared: give wrong_guesses, and neither changed_share nor cti_fraction"
            )

    def grouping(self) -> GroupingConfig | None:
        """How coarse the vocabulary becomes; None without groups."""
        if self.privatizer != "groups":
            return None
        return GroupingConfig(wrong_guesses=self.wrong_guesses)

    @property
    def draws(self) -> bool:
        """Whether there is noise, so that the same texts come out as others when sent again."""
        return self.privatizer not in ("none", "groups") or self.eta is not None

    def check_whole(self) -> None:
        """Raise ConfigError unless the config says how much noise there is."""
        if (
            self.privatizer not in ("none", "groups")
            and self.eta is None
            and self.changed_share is None
        ):
            raise ConfigError(
                "expected public_text, eta (--eta) or changed_share: public_text makes word "
                "groups, which keep no less accuracy; no amount of noise is right for all, and "
                "changed_share 0.5 finds the eta at which half of your tokens change, a good start"
            )

    def mechanism(self, eta: float | None) -> Mechanism | None:
        """The mechanism at an eta (per token, per unit of distance); None: no noise."""
        if self.privatizer == "none" or (self.privatizer == "groups" and eta is None):
            return None
        assert eta is not None
        assert self.privatizer != "auto"  # chosen when the config was made
        mode = "token" if self.privatizer == "groups" else self.privatizer
        return Mechanism(eta=eta, mode=mode, clip_norm=self.clip_norm)

    def importance(self) -> ImportanceConfig:
        """Which tokens get less noise in training texts."""
        return ImportanceConfig(
            fraction=self.cti_fraction, factor=self.cti_factor, special=self.special
        )
