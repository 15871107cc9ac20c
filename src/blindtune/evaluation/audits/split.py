"""What a vendor could read of a customer's texts in split tuning, before a real run: for customers.

The adversary is the vendor: it has the model, the announced noise, and public text of its own
(`attacks.adversary`). The judge is `evaluation.leakage`: empirical privacy (EP), 1 minus the share
of tokens that an attack read, with an interval over texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.evaluation.audits.attribute_attack import (
    KnownAttribute,
    attribute_findings,
    check_shared,
    known_attribute,
    read_attribute,
)
from blindtune.evaluation.audits.audit import (
    AdversaryConfig,
    Audit,
    AuditConfig,
    Finding,
    NotRun,
    show,
)
from blindtune.evaluation.audits.label_attacks import label_findings
from blindtune.evaluation.audits.language_attack import open_prior
from blindtune.evaluation.audits.split_attacks import ENDED, Attempt, Equipment, SplitAttacks
from blindtune.evaluation.audits.split_subject import (
    SplitSubject,
    open_subject,
    read_audited,
    spread_texts,
)
from blindtune.evaluation.leakage.empirical_privacy import (
    EmpiricalPrivacy,
    TokenLeakage,
    common_words,
    empirical_privacy,
)
from blindtune.exchange.packages.signing import Trust
from blindtune.split.bottom import Bottom
from blindtune.split.customer.privacy_statement import LARGE_EPSILON, PrivacyStatement
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig


def audit_split(
    subject: str | Path,
    *,
    bottom: str | Path | None = None,
    data: str | Path | None = None,
    public: str | Path | None = None,
    privatizer: PrivatizerConfig | None = None,
    reading: ReadingConfig | None = None,
    config: AuditConfig | None = None,
    adversary: AdversaryConfig | None = None,
    trust: Trust | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """Read a customer's texts as its vendor would.

    Args:
        subject: a bottom package: a sample of `data` is privatized as a run would, nothing is
            sent. Or a customer's job: the states that it drew. Or a recorded transcript.
        bottom: a job's or a transcript's package; None: where the job found it.
        data: the private texts, with labels or without; not for a job, which holds them.
        public: the attacker's own text, of the kind that the private texts are; None: attacks
            that learn are not run.
        privatizer: as for `split_tune`; a job has its own.
        reading: where the texts stand in their file.
        config: how hard the attacker tries.
        adversary: what it has, wants and does besides.
        trust: whose bottom packages are opened; None: anybody's.
        on_progress: called with (attack, done, of all).

    Raises:
        ConfigError: something is missing, or does not fit the subject.
        DataError, PackageError, PolicyError, MismatchError: see errors.py.
    """
    config, reading = config or AuditConfig(), reading or ReadingConfig()
    seen = open_subject(
        subject, bottom=bottom, data=data, privatizer=privatizer, reading=reading,
        tokens=config.test_tokens, trust=trust,
    )  # fmt: skip
    adversary = adversary or AdversaryConfig()
    check_adversary(
        adversary, seen.bottom, public=public, data=data if seen.places else None, reading=reading
    )
    texts = () if public is None else read_audited(seen.bottom, public, reading).ids
    chosen = spread_texts(texts, config.public_tokens) if texts else []
    learned = [texts[i] for i in chosen]
    truth, known = attributes(adversary, seen.places, chosen, public, data, reading)
    equipment = _equipment(adversary, seen, learned, known, reading)
    told = on_progress or (lambda *_: None)
    attacks = SplitAttacks(seen, learned, config, told, offered=len(texts), equipment=equipment)
    attacks.run()
    found: Sequence[Finding] = ()
    if known is not None and attacks.attribute_N is not None:
        found = attribute_findings(
            attacks.attribute_N, known, truth, config.confidence, attacks.attribute_note
        )
    return _audit(subject, public, seen, learned, attacks, config, found)


def check_adversary(
    adversary: AdversaryConfig,
    bottom: Bottom,
    *,
    public: str | Path | None,
    data: str | Path | None,
    reading: ReadingConfig,
) -> None:
    """Raise ConfigError for what this adversary cannot do with this bottom and these files."""
    check_public(adversary, public)
    if adversary.attribute_column is not None and data is None:
        raise ConfigError(
            "expected --data for --attribute-column, got a job, which has no columns: audit its "
            "bottom package with the options of the run"
        )
    if adversary.attribute_column is not None and reading.task == "language-model":
        raise ConfigError(
            "expected --attribute-column for a task of texts, got the windows of a language model: "
            "leave it out"
        )
    if adversary.dummies and not bottom.cut.cut:
        raise ConfigError(
            "expected a bottom with layers for --dummies, got a cut at 0, where the nearest "
            "neighbour is what it would find: leave it out"
        )


def check_public(adversary: AdversaryConfig, public: object) -> None:
    """Raise ConfigError for what needs public text, where there is none."""
    for name, given in (
        ("prior", adversary.prior),
        ("attribute-column", adversary.attribute_column),
    ):
        if given is not None and public is None:
            raise ConfigError(f"expected --public for --{name}: give text like yours")


def _equipment(
    adversary: AdversaryConfig,
    seen: SplitSubject,
    learned: Sequence[Tensor],
    known: KnownAttribute | None,
    reading: ReadingConfig,
) -> Equipment:
    prior = adversary.prior
    return Equipment(
        prior=None if prior is None else open_prior(prior, seen.bottom, learned),
        attribute=known,
        dummies=adversary.dummies,
        windows=reading.task == "language-model" or seen.windows,
    )


def attributes(
    adversary: AdversaryConfig,
    attacked: Sequence[int],
    chosen: Sequence[int],
    public: str | Path | None,
    data: str | Path | None,
    reading: ReadingConfig,
) -> tuple[Sequence[str | None], KnownAttribute | None]:
    """The true values of the attacked texts, for the judge, and what the adversary knows.

    Args:
        adversary: whose attribute column it is.
        attacked, chosen: which texts of `data`, and of `public`.
        public, data, reading: as for `audit_split`.

    Raises:
        DataError: too few public values, or none that an attacked text has.
    """
    column = adversary.attribute_column
    if column is None or public is None or data is None:
        return (), None
    theirs, mine = (read_attribute(path, column, reading) for path in (public, data))
    known = known_attribute(column, [theirs[i] for i in chosen])
    truth = [mine[i] for i in attacked]
    check_shared(known, truth)
    return truth, known


def _audit(
    subject: str | Path,
    public: str | Path | None,
    seen: SplitSubject,
    learned: Sequence[Tensor],
    attacks: SplitAttacks,
    config: AuditConfig,
    attribute: Sequence[Finding],
) -> Audit:
    common = common_words(learned, seen.bottom.margins) if learned else None
    scored = [(attempt, _score(attempt, seen, config, common)) for attempt in attacks.attempts]
    findings = [f for attempt, leak in scored for f in _findings(attempt, leak)]
    findings += label_findings(seen, config.confidence)
    findings += attribute
    real = sorted((pair for pair in scored if pair[0].real), key=lambda pair: pair[1].content.value)
    best = real[0][0]
    blind = next((s for a, s in scored if a.attack.startswith("guessing")), None)
    facts = dict(seen.facts)
    if public is not None:
        facts["attacker's text"] = f"{len(learned):,} texts of {Path(public).name}"
    cut = seen.bottom.cut
    facts["cut"] = f"{cut.cut} of {cut.layers} layers at the customer, {cut.partition}"
    return Audit(
        kind="split",
        subject=str(subject),
        verdict=" ".join(
            [*_verdict(real, blind), *_of_attribute(attribute), *_doubts(seen, attacks)]
        ),
        guarantee=guarantee(seen.statement),
        findings=tuple(findings),
        strongest=next(k for k, f in enumerate(findings) if f.attack == best.attack),
        not_run=(*attacks.not_run, *_gradients(seen)),
        settled=attacks.settled,
        facts=facts,
    )


def _score(
    attempt: Attempt, seen: SplitSubject, config: AuditConfig, common: Tensor | None
) -> TokenLeakage:
    return empirical_privacy(
        attempt.guess, seen.ids, margins=seen.bottom.margins,
        contributing=seen.contributing, common=common, confidence=config.confidence,
    )  # fmt: skip


def _findings(attempt: Attempt, leak: TokenLeakage) -> list[Finding]:
    found = [_finding(attempt, "EP", leak.content, f"read {_share(leak.content)} of the tokens")]
    for measure, part, kind in (
        ("EP, contributing tokens", leak.contributing, "the tokens that CTI spares"),
        ("EP, other tokens", leak.other, "the tokens with full noise"),
        ("EP, rarer words", leak.rare, "the words beside the commonest, which fill half a text"),
    ):
        if part is not None:
            found.append(_finding(attempt, measure, part, f"read {_share(part)} of {kind}"))
    texts = leak.whole_texts
    said = f"read {texts.right:,} of {texts.of:,} texts without a mistake"
    found.append(_finding(attempt, "EP, whole texts", texts, said))
    return found


def _finding(attempt: Attempt, measure: str, part: EmpiricalPrivacy, said: str) -> Finding:
    sentence = f"It {said}." if attempt.real else f"It would {said}."
    note = attempt.note if measure == "EP" else ""
    return Finding(
        attack=attempt.attack,
        knew=attempt.knew,
        measure=measure,
        value=part.value,
        low=part.low,
        high=part.high,
        meaning=f"{sentence} {note}".strip(),
    )


def _share(part: EmpiricalPrivacy) -> str:
    return f"{1 - part.value:.1%}"


def _verdict(real: Sequence[tuple[Attempt, TokenLeakage]], blind: TokenLeakage | None) -> list[str]:
    """Sentences on what the strongest attack read of all tokens, of texts, and of rarer words.

    `real` is sorted, the strongest on all tokens first; of equal ones that one is named.
    """
    best, leak = real[0]
    content = leak.content
    reader, score = min(real, key=lambda pair: pair[1].whole_texts.value)
    texts = score.whole_texts
    by = "" if reader is best else f" by {reader.attack}"
    said = [
        f"The strongest attack, {best.attack}, reads {_share(content)} of your tokens: an EP of "
        f"{show(content.value)}, between {show(content.low)} and {show(content.high)}; "
        f"{texts.right:,} of {texts.of:,} texts come out whole{by}."
    ]
    rarer = [(attempt, score.rare) for attempt, score in real if score.rare is not None]
    if rarer:
        reader, rare = min(rarer, key=lambda pair: pair[1].value)
        who = "it" if reader is best else f"the strongest there, {reader.attack},"
        said.append(f"Of the words beside the commonest {who} reads {_share(rare)}.")
    if blind is not None:
        said.append(f"Saying the commonest word each time gets {_share(blind.content)}.")
    return said


def _of_attribute(attribute: Sequence[Finding]) -> list[str]:
    return [f"Attribute inference: {attribute[0].meaning[3:]}"] if attribute else []


def _doubts(seen: SplitSubject, attacks: SplitAttacks) -> list[str]:
    """Sentences on why a high EP may say less than it seems to."""
    said, cut = [], seen.bottom.cut.cut
    if cut and not attacks.learns:
        said.append(
            "No attack that learns from public text was run: behind layers a high EP of the "
            "nearest neighbour alone says nothing."
        )
    if not attacks.settled:
        said.append(ENDED)
    return said


def guarantee(statement: PrivacyStatement) -> tuple[str, ...]:
    """What is accounted for, in sentences; then what it does not cover."""
    spending = statement.spending
    if statement.privatizer in ("none", "groups") and spending is None:
        return (*(f"{line[:1].upper()}{line[1:]}." for line in statement.account.splitlines()),
                *_notes(statement))  # fmt: skip
    drawn = statement.privatizer == "exponential"
    what = "Words are drawn at a mean distance of" if drawn else "The noise has a mean norm of"
    said = [
        f"Privatizer {statement.privatizer}, eta {statement.eta:.4g}: per token, per unit of "
        f"distance, under d_chi (metric) privacy. {what} {statement.noise_norm:.3g}."
    ]
    if spending is None:
        return (*said, f"{statement.account[:1].upper()}{statement.account[1:]}.",
                *_notes(statement))  # fmt: skip
    epsilon, mean, most = (
        float(spending[f"epsilon_per_{what}"]) for what in ("token", "record_mean", "record_max")
    )
    said.append(
        f"For a word that lies {spending['distance']:.3g} away, that is epsilon {epsilon:.4g} per "
        f"token; {mean:.4g} per text on average and {most:.4g} at most, for a text that differs in "
        "every word."
    )
    if epsilon > LARGE_EPSILON:
        said.append(
            "So large an epsilon rules out nothing in practice: what protects is that the attacks "
            "below fail, as far as they do."
        )
    if spending["unprotected_tokens"]:
        said.append(f"{spending['unprotected_tokens']:,} tokens have no noise and no guarantee.")
    return (*said, *_notes(statement))


def _notes(statement: PrivacyStatement) -> list[str]:
    return [f"{note[:1].upper()}{note[1:]}." for note in statement.notes]


def _gradients(seen: SplitSubject) -> tuple[NotRun, ...]:
    """What the U-shape sends besides states, where it was not recorded."""
    if seen.bottom.cut.partition != "u-shape" or seen.passes or seen.predicted is not None:
        return ()
    needs = (
        "a transcript with steps of the tuning, and --task and labels of the run; they group texts "
        "by the label that was trained on (docs/attacks.md)"
    )
    return (NotRun(attack="gradients", needs=needs),)
