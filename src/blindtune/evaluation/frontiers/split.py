"""The privacy-utility frontier of split tuning: cuts, amounts of noise, groups on the same data.

Before a real run, whoever has a model and texts of the customer's kind tries settings: cuts with
noise (eta, CTI) and with word groups. A setting is tuned as the two parties would, in one process:
texts are privatized once, the vendor tunes on the states, the tuned job is asked about noised test
texts; that gives the utility accuracy (UA). Then the training texts are attacked as `audit_split`
does; empirical privacy (EP) is the share of tokens that an attack gets wrong, and the strongest
attack is what counts.

At every cut the split without noise is a setting too: what noise costs, and what depth alone hides.
Every finished row is kept in OUT/rows, under a digest of all that decides it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal, final, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.audits.audit import AdversaryConfig, AuditConfig
from blindtune.evaluation.audits.split import audit_split, check_public
from blindtune.evaluation.audits.split_attacks import FEWEST_PUBLIC, public_needed
from blindtune.evaluation.audits.split_subject import read_audited, spread_texts
from blindtune.evaluation.frontiers.sweeps import KeptRows, unbeaten
from blindtune.exchange.wire.transport import InProcessTransport
from blindtune.kinds import check_kinds
from blindtune.models.encoders import load_any
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.models.tokenizers import tokenizer_files
from blindtune.places import data_source, located
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.labelled_text import read_texts
from blindtune.split.customer.own_groups import public_words
from blindtune.split.customer.prediction import predict
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig
from blindtune.split.customer.tuning_job import split_tune
from blindtune.split.partition import Cut, stack_of
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.handler import Vendor

OnRow = Callable[[str, int, int], None]
OFFERED = {"language model": "--prior", "dummy embeddings": "--dummies"}
"""Attacks that are run if they are asked for, and how."""
EACH = 0.995
"""Confidence of each attack's two-sided interval, so that up to 19 lower ends hold at once."""
NoisedName = Literal["token", "exponential", "vector", "groups"]


@dataclass(frozen=True, kw_only=True)
class SplitFrontierConfig:
    """Which settings are tried."""

    cut: tuple[int, ...] = (0,)
    """Layers at the customer."""
    privatizer: NoisedName = "exponential"
    """What is noised: exponential, token or vector, as in split-tune. groups: nothing, word groups
    alone are tried."""
    eta: tuple[float, ...] = ()
    """Values of eta, per token and unit of distance."""
    changed_share: tuple[float, ...] = (0.15, 0.4, 0.65)
    """Where no eta is given: shares of the tokens that shall change, from which eta follows."""
    cti_fraction: tuple[float, ...] = (0.0,)
    """Shares of the vocabulary that CTI spares for each class; 0: no CTI."""
    public_text: str | None = None
    """A file of public text of the kind that the customer's is: word groups made from it are tried
    beside noise."""
    wrong_guesses: tuple[float, ...] = (0.6, 0.75)
    """How coarse these groups are: shares of frequent words' tokens that a guess by frequency shall
    get wrong."""

    def __post_init__(self) -> None:
        """Refuse empty sweeps; what else is out of range, the privatizer's config refuses."""
        check_kinds(self)
        if not (self.cut and self.cti_fraction and (self.eta or self.changed_share)):
            raise ConfigError("expected at least one cut, cti_fraction, and eta or changed_share")
        if self.privatizer not in get_args(NoisedName):
            names = ", ".join(get_args(NoisedName))
            raise ConfigError(f"expected privatizer {names}, got {self.privatizer!r}")
        self._check_unused()
        _ = self.privatizers

    def _check_unused(self) -> None:
        """Refuse options that no setting would have."""
        alone, text = self.privatizer == "groups", self.public_text
        if text is None and (alone or set(self.wrong_guesses) != set(type(self).wrong_guesses)):
            raise ConfigError(
                "expected public_text with wrong_guesses or privatizer groups, got none: word "
                "groups are made of it"
            )
        if text is not None and not self.wrong_guesses:
            raise ConfigError("expected wrong_guesses with public_text: how coarse groups are")
        shares = set(self.changed_share) != set(type(self).changed_share)
        if alone and (self.eta or shares or any(self.cti_fraction)):
            raise ConfigError(
                "groups alone have no noise to choose and spare no token: leave eta, changed_share "
                "and cti_fraction, or name the privatizer that is tried beside them"
            )
        if self.eta and shares:
            raise ConfigError("expected eta or changed_share, which chooses eta, got both")

    @property
    def privatizers(self) -> tuple[PrivatizerConfig, ...]:
        """Every setting of one cut, the one without noise first."""
        levels: list[tuple[float | None, float | None]]
        levels = [(eta, None) for eta in sorted(set(self.eta))[::-1]]
        levels = levels or [(None, share) for share in sorted(set(self.changed_share))]
        noised = [
            PrivatizerConfig(
                privatizer=self.privatizer, eta=eta, changed_share=share, cti_fraction=cti
            )
            for cti in sorted(set(self.cti_fraction))
            for eta, share in levels
            if self.privatizer != "groups"
        ]
        grouped = [
            PrivatizerConfig(public_text=self.public_text, wrong_guesses=wrong)
            for wrong in sorted(set(self.wrong_guesses))
            if self.public_text is not None
        ]
        return (PrivatizerConfig(privatizer="none", unprotected=True), *noised, *grouped)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How every setting is tuned, read and attacked: the configs of `split_tune` and `audit`."""

    tuning: TuningConfig = field(default_factory=TuningConfig)
    passes: PassConfig = field(default_factory=lambda: PassConfig(epochs=2))
    reading: ReadingConfig = field(default_factory=lambda: ReadingConfig(max_length=64))
    trying: AuditConfig = field(
        default_factory=lambda: AuditConfig(test_tokens=4096, attack_seconds=60.0)
    )
    """How hard the attacker tries; `confidence` and `fresh_draws` are the sweep's own."""
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    """What the attacker has and does besides; `dummies` at cuts above 0. No attribute is guessed:
    settings are compared by the words that are read."""

    def __post_init__(self) -> None:
        """Refuse tasks that have no accuracy, and what settings are not compared by."""
        if self.adversary.attribute_column is not None:
            raise ConfigError(
                "a sweep compares settings by the words that attacks read: leave attribute_column, "
                "and audit the chosen setting with it"
            )
        if self.reading.task != "classification":
            raise ConfigError(
                "expected the task classification for a sweep, whose settings are compared by "
                f"accuracy, got {self.reading.task}: tune settings of it one by one"
            )


@dataclass(frozen=True, kw_only=True)
class SplitSetting:
    """One setting's utility and privacy."""

    cut: int
    eta: float | None
    """None: no noise."""
    cti_fraction: float
    ua: float
    """Accuracy on noised test texts."""
    ep: float
    """Share of tokens that the strongest attack gets wrong, in training texts."""
    ep_low: float
    """With 95 % confidence no attack that was run leaves less on texts of this kind (one-sided;
    Bonferroni over the attacks)."""
    strongest: str
    """Which attack that is."""
    ep_nearest: float
    """The same of the nearest-neighbour attack."""
    settled: bool
    """Whether the trained attacks ended by themselves, not by `attack_seconds`."""
    wrong_guesses: float | None = None
    """How coarse the word groups are; None: there are none."""
    not_run: tuple[str, ...] = ()
    """Attacks that fit and were not run."""

    @property
    def name(self) -> str:
        """The setting in short."""
        if self.wrong_guesses is not None:
            return f"cut {self.cut}, groups {self.wrong_guesses:g}"
        noise = "no noise" if self.eta is None else f"eta {self.eta:.4g}"
        spared = f", CTI {self.cti_fraction:g}" if self.cti_fraction else ""
        return f"cut {self.cut}, {noise}{spared}"

    @property
    def open(self) -> bool:
        """Whether nothing hides the words but the layers."""
        return self.eta is None and self.wrong_guesses is None


@final
@dataclass(frozen=True, kw_only=True)
class SplitFrontier:
    """All that was measured."""

    settings: tuple[SplitSetting, ...]
    public: str | None
    """What the attacker learned from; None: nothing, and attacks that learn were not run."""
    config: SplitFrontierConfig = field(default_factory=SplitFrontierConfig)
    trial: Trial = field(default_factory=Trial)

    @property
    def best_ua(self) -> float:
        """The best accuracy without noise or groups."""
        return max(s.ua for s in self.settings if s.open)

    def efficient(self) -> tuple[SplitSetting, ...]:
        """Settings that no other one beats in UA and EP at once, best UA first."""
        return unbeaten(self.settings, lambda s: (s.ua, s.ep))

    def mildest(self, ep: float) -> SplitSetting | None:
        """The setting that hides no more than it must to hold every attack at this EP.

        Of noise the largest eta that does (none at all counts as the largest), of groups the least
        coarse ones, of equal ones the best UA; of these two, the better UA. It holds the attacks
        with the confidence of `ep_low`, each setting's own.

        Raises:
            ConfigError: as for `check_answerable`.
        """
        grouped = any(s.wrong_guesses is not None for s in self.settings)
        check_answerable((s.cut for s in self.settings), self.public, grouped=grouped)
        held = [s for s in self.settings if s.ep_low >= ep]
        noised = [(s.eta or math.inf, s.ua, s) for s in held if s.wrong_guesses is None]
        coarse = [(-s.wrong_guesses, s.ua, s) for s in held if s.wrong_guesses is not None]
        best = [max(some, key=lambda found: found[:2])[2] for some in (noised, coarse) if some]
        return max(best, key=lambda s: s.ua, default=None)

    def facts(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        efficient = self.efficient()
        rows = [asdict(s) | {"name": s.name, "efficient": s in efficient} for s in self.settings]
        return {"best_ua": self.best_ua, "public": self.public, "settings": rows}


def check_tried(adversary: AdversaryConfig, cuts: Iterable[int], public: object) -> None:
    """Raise ConfigError for an adversary that could do nothing in any setting of a sweep."""
    check_public(adversary, public)
    if adversary.dummies and not any(cuts):
        raise ConfigError(
            "expected a cut above 0 for --dummies, got none: at cut 0 the nearest neighbour is "
            "what it would find; leave it out"
        )


def check_answerable(cuts: Iterable[int], public: object, *, grouped: bool) -> None:
    """Refuse the question of what holds every attack where no attack was run that could tell.

    Behind layers the nearest neighbour reads little whatever there is to read: a trained network
    reads nine tokens of ten where it misses four of five (docs/split-results.md). Of groups it
    misses all words that stand for no group, which a guess by frequency need not.

    Raises:
        ConfigError: a cut above 0, or groups, without public text to learn from.
    """
    if public is None and grouped:
        raise ConfigError(
            "expected --public to answer --ep with word groups, got none: without text to learn "
            "from no attack looks into a group; give --public, or leave --ep"
        )
    deepest = max(cuts, default=0)
    if public is None and deepest > 0:
        raise ConfigError(
            f"expected --public to answer --ep at cut {deepest}, got none: behind layers only "
            "attacks that learn from text read much, and a high EP of the nearest neighbour says "
            "nothing; give --public, leave --ep, or sweep cut 0 alone"
        )


def split_frontier(
    model: str | Path,
    data: str | Path,
    test: str | Path,
    out: str | Path,
    config: SplitFrontierConfig | None = None,
    *,
    public: str | Path | None = None,
    trial: Trial | None = None,
    on_row: OnRow = lambda *_: None,
) -> SplitFrontier:
    """Sweep settings; rows that are there under the same digest are not run again.

    Args:
        model: a local directory, a hub name, or an embedded model.
        data: labelled texts of the customer's kind, tuned on and attacked.
        test: labelled texts that are predicted.
        out: directory of rows and work.
        config: the sweep.
        public: the attacker's own text; None: only attacks that learn nothing are run.
        trial: how every setting is tuned, read and attacked.
        on_row: called with (setting, done, of all).

    Raises:
        ModelError, DataError, ConfigError, OutputError: see errors.py.
    """
    config, trial = config or SplitFrontierConfig(), trial or Trial()
    text = None if public is None else Path(data_source(public))
    files = (Path(data_source(data)), Path(data_source(test)), text)
    sweep = _Sweep(str(model), *files, located(out), config, trial)
    tried = [(cut, p) for cut in sorted(set(config.cut)) for p in config.privatizers]
    settings = []
    with sweep.rows.alone():
        for done, (cut, privatizer) in enumerate(tried):
            on_row("settings", done, len(tried))
            settings.append(sweep.setting(cut, privatizer))
        on_row("settings", len(tried), len(tried))
    return SplitFrontier(
        settings=tuple(settings), public=None if text is None else str(text), config=config,
        trial=trial,
    )  # fmt: skip


@final
class _Sweep:
    """The rows of one sweep, and where they are kept."""

    def __init__(
        self,
        model: str,
        data: Path,
        test: Path,
        public: Path | None,
        out: Path,
        config: SplitFrontierConfig,
        trial: Trial,
    ) -> None:
        check_files(data, test, public, config.public_text)
        self.model, self.data, self.test, self.public = model, data, test, public
        trying = replace(trial.trying, confidence=EACH, fresh_draws=1)
        self.rows, self.trial = KeptRows(out), replace(trial, trying=trying)
        check_tried(trial.adversary, config.cut, public)
        loaded, tokenizer = load_any(model)
        self.layers = stack_of(loaded).layer_count
        for cut in config.cut:
            Cut(layers=self.layers, cut=cut)  # refuses what cannot be before anything is tuned
        if config.public_text is not None:
            public_words(tokenizer, config.public_text)  # refuses what no groups are made of
        files = [path for path in (data, test, public) if path is not None]
        # What word groups are made of decides by its content, and not by its name; so does a prior.
        self._public_text = config.public_text and _digest(located(config.public_text))
        tried = asdict(self.trial)
        if (prior := self.trial.adversary.prior) is not None:
            tried["adversary"]["prior"] = _digests(load_model(prior), load_tokenizer(prior))
        self._decides = [_digests(loaded, tokenizer), *map(_digest, files), tried]

    def _check_texts(self) -> None:
        """Raise for texts that would turn out to be of no use once a setting is tuned."""
        reading, tokens = self.trial.reading, self.trial.trying.public_tokens
        test = read_texts(
            self.test, text_column=reading.text_column, label_column=reading.label_column
        )
        if not test.labelled:
            raise ConfigError(f"{self.test}: expected texts with labels to score on")
        if self.public is None:
            return
        texts = read_audited(open_bottom(self.rows.work / "bottom"), self.public, reading).ids
        left = len(spread_texts(texts, tokens))
        if left < FEWEST_PUBLIC:
            raise ConfigError(
                f"{self.public}: expected public text that attacks can learn from, which needs "
                f"{public_needed(left, len(texts), tokens)}; or leave --public"
            )

    def setting(self, cut: int, privatizer: PrivatizerConfig) -> SplitSetting:
        """Tune, predict, attack; or what an earlier sweep found."""
        hiding = asdict(privatizer)
        hiding["public_text"] = hiding["public_text"] and self._public_text
        decides = [*self._decides, cut, hiding]
        found = self.rows.row(str(cut), decides, lambda: self._measure(cut, privatizer))
        return SplitSetting(**found | {"not_run": tuple(found["not_run"])})

    def _measure(self, cut: int, privatizer: PrivatizerConfig) -> dict[str, Any]:
        trial, place, bottom = self.trial, self.rows.work, self.rows.work / "bottom"
        model, tokenizer = load_any(self.model)
        parts, longest = Cut(layers=self.layers, cut=cut), trial.reading.max_length
        identity = write_bottom(model, tokenizer, bottom, parts, max_length=longest)
        self._check_texts()
        vendor = Vendor(stack_of(model), parts, identity, place / "vendor")
        with vendor.session("customer") as handler:
            done = split_tune(
                partial(InProcessTransport, handler), bottom, self.data, place / "job", privatizer,
                trial.tuning, trial.passes, reading=trial.reading, silent=True,
            )  # fmt: skip
        with vendor.session("customer") as handler:
            asked = predict(partial(InProcessTransport, handler), place / "job", self.test)
        adversary = replace(trial.adversary, dummies=trial.adversary.dummies and cut > 0)
        audit = audit_split(
            place / "job", public=self.public, reading=trial.reading, config=trial.trying,
            adversary=adversary,
        )  # fmt: skip
        eps = {f.attack: f for f in audit.findings if f.measure == "EP"}
        assert len(eps) * (1 - EACH) / 2 <= 0.05, "too many attacks for the bound that is promised"
        strongest = audit.findings[audit.strongest]
        return {
            "cut": cut, "eta": done.privacy.eta, "cti_fraction": privatizer.cti_fraction,
            "wrong_guesses": None if privatizer.grouping() is None else privatizer.wrong_guesses,
            "ua": asked.scores["accuracy"], "ep": strongest.value,
            "ep_low": min(f.low for f in eps.values() if f.low is not None),
            "strongest": strongest.attack, "ep_nearest": eps["nearest neighbour"].value,
            "settled": audit.settled,
            "not_run": [n.attack for n in audit.not_run if n.attack in OFFERED],
        }  # fmt: skip


def check_files(*paths: str | Path | None) -> None:
    """Raise DataError for what is no file: rows are kept by what files hold, not by names."""
    for path in paths:
        if path is not None and not Path(data_source(path)).is_file():
            raise DataError(
                f"{path}: expected a file, there is none: a sweep reads no data set of the hub, "
                "check the path or save it first"
            )


def _digests(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    files = tokenizer_files(tokenizer).values()
    return [fingerprint(model), *(sha256(content).hexdigest() for content in files)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
