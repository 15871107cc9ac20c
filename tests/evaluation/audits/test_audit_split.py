"""Audits of split tuning: all is read without noise, nothing under much, and jobs as they are."""

import csv
import random
import re
from dataclasses import asdict, replace

import pytest
import torch

from blindtune.attacks.trained_inversion import train_inverter
from blindtune.errors import ConfigError, DataError, PackageError
from blindtune.evaluation.audits import split_attacks
from blindtune.evaluation.audits.audit import AuditConfig
from blindtune.evaluation.audits.split import _verdict, audit_split
from blindtune.evaluation.audits.split_attacks import Attempt
from blindtune.evaluation.audits.split_subject import spread_texts
from blindtune.evaluation.leakage.empirical_privacy import empirical_privacy
from blindtune.evaluation.pages.audit import page
from blindtune.evaluation.pages.report import render
from blindtune.exchange.wire.messages import Batch, BatchResult, Predict, Predictions
from blindtune.exchange.wire.transcript import Recorder
from blindtune.exchange.wire.transport import InProcessTransport
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.job import CustomerJob, JobRecord
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.private_texts import ReadingConfig, read_training
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import new_token
from blindtune.split.partition import Cut
from tiny_encoders import tiny_encoder
from tiny_models import tiny_model, tiny_tokenizer

OPEN = PrivatizerConfig(privatizer="none", unprotected=True)
TOKEN = PrivatizerConfig(privatizer="token", changed_share=0.5)
CONFIG = AuditConfig(attack_seconds=1.5, fresh_draws=4, test_tokens=600)
NOUNS = ("film", "story", "actor", "ending", "plot", "scene", "music", "joke")
TRAITS = ("good", "bad", "dull", "fine", "slow", "great", "odd", "sad")


def sentences(count, seed):
    draw = random.Random(seed)
    return [f"the {draw.choice(NOUNS)} is {draw.choice(TRAITS)}" for _ in range(count)]


def different(count, seed):
    return list(dict.fromkeys(sentences(9 * count, seed)))[:count]


def write_labelled(path, texts):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows((text, i % 2) for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Bottom packages at cut 0 and 1, a decoder's U-shape, private and public texts."""
    place = tmp_path_factory.mktemp("split")
    for cut in (0, 1):
        write_bottom(tiny_encoder("bert"), tiny_tokenizer(), place / f"bottom{cut}",
                     Cut(layers=3, cut=cut))  # fmt: skip
    llama = tiny_model("llama")
    cut = Cut(partition="u-shape", layers=llama.config.num_hidden_layers, cut=0)
    write_bottom(llama, tiny_tokenizer(), place / "u-shape", cut)
    write_labelled(place / "train.csv", different(30, 1))
    (place / "public.txt").write_text("\n".join(sentences(60, 2)))
    return place


def audited(world, bottom="bottom0", privatizer=OPEN, **options):
    return audit_split(
        world / bottom, data=world / "train.csv", privatizer=privatizer,
        config=options.pop("config", CONFIG), **options,
    )  # fmt: skip


def eps(found):
    return {f.attack: f for f in found.findings if f.measure == "EP"}


def test_without_noise_everything_is_read(world):
    found = audited(world)
    best = found.findings[found.strongest]
    assert (best.value, best.measure) == (0.0, "EP")
    assert "reads 100.0% of your tokens" in found.verdict
    assert "no promise" in found.guarantee[0]
    assert {"trained inverter", "trigrams"} <= {skipped.attack for skipped in found.not_run}
    assert all("--public" in s.needs for s in found.not_run[:2])


def test_texts_that_lose_their_end_are_counted(world):
    found = audited(world, reading=ReadingConfig(max_length=4))
    assert any("30 lose their end" in said for said in found.guarantee)
    assert not any("lose their end" in said for said in audited(world).guarantee)


def test_pure_noise_hides_all_but_the_commonest_word(world):
    noise = PrivatizerConfig(privatizer="token", eta=0.01)
    found = audited(world, privatizer=noise, public=world / "public.txt")
    every = eps(found)
    assert list(every) == [
        "nearest neighbour", "trained inverter", "trained inverter, trigrams", "Bayes",
        "Bayes, trigrams", "guessing, no attack", "4 fresh draws, never sent",
    ]  # fmt: skip
    assert every["nearest neighbour"].value > 0.95
    assert all(f.low <= f.value <= f.high for f in found.findings)
    best = found.findings[found.strongest]
    real = [
        f.value for f in every.values() if "guessing" not in f.attack and "draws" not in f.attack
    ]
    assert best.value == min(real)
    assert "eta 0.01" in found.guarantee[0]
    assert "Saying the commonest word each time" in found.verdict


def test_drawn_words_are_attacked_by_their_own_probabilities(world):
    drawn = PrivatizerConfig(privatizer="exponential", changed_share=0.5)
    found = audited(world, privatizer=drawn, public=world / "public.txt")
    every = eps(found)
    assert 0.2 < every["nearest neighbour"].value < 0.8
    assert every["Bayes"].value < every["nearest neighbour"].value
    fresh = every["4 fresh draws, never sent"]
    assert fresh.value < every["Bayes"].value
    voted = eps(audited(world, privatizer=drawn))["4 fresh draws, never sent"]
    assert fresh.value < voted.value < every["nearest neighbour"].value
    assert "Bayes' rule" in fresh.knew
    assert "Words are drawn at a mean distance of" in found.guarantee[0]


def test_rarer_words_are_scored_apart(world):
    found = audited(world, public=world / "public.txt")
    rarer = {f.attack: f for f in found.findings if f.measure == "EP, rarer words"}
    assert rarer["nearest neighbour"].value == 0
    assert rarer["guessing, no attack"].value == 1 > eps(found)["guessing, no attack"].value
    assert "Of the words beside the commonest it reads 100.0%" in found.verdict
    alone = audited(world)
    assert not any(f.measure == "EP, rarer words" for f in alone.findings)


def test_patience_reads_what_one_draw_hides(world):
    noise = PrivatizerConfig(privatizer="vector", changed_share=0.6)
    config = AuditConfig(fresh_draws=64, test_tokens=600)
    every = eps(audited(world, privatizer=noise, config=config))
    fresh = every["64 fresh draws, never sent"]
    assert fresh.high < every["nearest neighbour"].low
    assert "You send one draw" in fresh.knew


def test_tokens_that_are_spared_are_told_apart(world):
    noise = PrivatizerConfig(privatizer="token", eta=0.01, cti_fraction=0.02)
    found = audited(world, privatizer=noise, config=AuditConfig(fresh_draws=1))
    by = {f.measure: f.value for f in found.findings}
    assert by["EP, contributing tokens"] < 0.1 < 0.9 < by["EP, other tokens"]
    assert any("no noise and no guarantee" in said for said in found.guarantee)


def test_a_model_with_positions_is_read_by_an_inverter_behind_a_block(world):
    found = audited(world, "bottom1", public=world / "public.txt")
    every = eps(found)
    assert every["trained inverter"].value < every["nearest neighbour"].value
    assert every["trained inverter"].value < 0.3
    alone = "No attack that learns from public text was run"
    assert alone not in found.verdict
    assert alone in audited(world, "bottom1").verdict
    assert alone not in audited(world).verdict


def test_an_encoders_embeddings_are_read_by_the_noises_density_behind_the_norm(world):
    noise = PrivatizerConfig(privatizer="vector", changed_share=0.4)
    found = audited(world, privatizer=noise, public=world / "public.txt")
    every = eps(found)
    assert "noise density" not in {skipped.attack for skipped in found.not_run}
    assert every["noise density"].value < every["nearest neighbour"].value


def test_a_decoders_embeddings_are_read_by_the_noises_density(world):
    noise = PrivatizerConfig(privatizer="vector", changed_share=0.4)
    found = audited(world, "u-shape", noise, public=world / "public.txt")
    every = eps(found)
    assert every["noise density"].value <= every["nearest neighbour"].value
    assert "gradients" in {skipped.attack for skipped in found.not_run}


def test_words_of_a_group_are_told_by_their_frequency(world):
    public = world / "many.txt"
    public.write_text("\n".join(sentences(4000, 3)))
    noise = PrivatizerConfig(
        privatizer="groups", public_text=str(public), wrong_guesses=0.3
    )  # fmt: skip
    every = eps(audited(world, privatizer=noise, public=world / "public.txt"))
    assert every["word of the group"].value <= every["nearest neighbour"].value
    assert 0 < every["word of the group"].value < 0.9


def test_noise_among_groups_is_attacked_with_its_own_channel(world):
    public = world / "many.txt"
    public.write_text("\n".join(sentences(4000, 3)))
    noise = PrivatizerConfig(
        privatizer="groups", public_text=str(public), wrong_guesses=0.3, eta=9.0
    )
    every = eps(audited(world, privatizer=noise, public=world / "public.txt"))
    assert every["Bayes"].value <= every["word of the group"].value <= 1
    assert {"word of the group, trigrams", "Bayes, trigrams"} <= set(every)


def job_of(world, place, privatizer, eta):
    """A customer's job as far as its drawn states."""
    bottom = open_bottom(world / "bottom0")
    texts = read_training(bottom, world / "train.csv", ReadingConfig())
    record = JobRecord(
        partition="two-part", bottom=bottom.id, bottom_path=str(world / "bottom0"), data="",
        options={"privatizer": asdict(privatizer), "reading": asdict(ReadingConfig())},
        eta=eta, names=texts.names,
    )  # fmt: skip
    job = CustomerJob.begin(place, record, new_token())
    job.keep_states(privatize(bottom, texts.ids, texts.labels, mechanism=privatizer.mechanism(eta)))
    return job


def test_a_job_is_read_as_it_was_drawn(world, tmp_path):
    job = job_of(world, tmp_path / "job", TOKEN, 20.0)
    one, two = (audit_split(job.path, config=AuditConfig(fresh_draws=1)) for _ in range(2))
    assert one == two  # nothing is drawn
    assert one.facts["states"] == "those that the job sends"
    (nearest, _) = one.findings
    assert nearest.value == pytest.approx(job.states().changed, abs=0.02)
    with pytest.raises(ConfigError, match="expected the bottom package"):
        audit_split(job.path, bottom=world / "bottom1")


def recorded(private, batches, asked=()):
    """What a recorder sees of a customer that sends these batches, then asks about these texts."""
    recorder = Recorder()

    def answer(message):
        if isinstance(message, Predict):
            return Predictions(logits_BC=torch.zeros(len(message.lengths), 2))
        return BatchResult(sequence=1, loss=0.5, metrics={})

    transport = InProcessTransport(answer, tap=recorder)
    for sequence, batch in enumerate(batches, 1):
        hidden_TD, lengths = private.rows(batch)
        transport.call(
            Batch(sequence=sequence, hidden_TD=hidden_TD, lengths=lengths,
                  labels=private.labels[batch])
        )  # fmt: skip
    for file in asked:
        hidden_TD, lengths = file.rows(range(len(file)))
        transport.call(Predict(hidden_TD=hidden_TD, lengths=lengths))
    return recorder.transcript()


def test_a_transcript_is_read_beside_the_customers_texts(world, tmp_path):
    privatizer = PrivatizerConfig(privatizer="vector", eta=300.0)
    private = job_of(world, tmp_path / "job", privatizer, 300.0).states()
    order = torch.randperm(len(private), generator=torch.Generator().manual_seed(0)).tolist()
    recorded(private, [order[:20], order[20:], order[:20]]).save(tmp_path / "run.bin")
    found = audit_split(
        tmp_path / "run.bin", bottom=world / "bottom0", data=world / "train.csv",
        privatizer=privatizer, config=AuditConfig(fresh_draws=1),
    )  # fmt: skip
    assert found.facts["crossed"] == "30 different texts, 50 in all"
    assert found.findings[0].value < 0.05
    with pytest.raises(ConfigError, match="--data"):
        audit_split(tmp_path / "run.bin", bottom=world / "bottom0", privatizer=OPEN)
    (tmp_path / "run.bin").write_bytes((tmp_path / "run.bin").read_bytes()[:-3])
    with pytest.raises(PackageError, match="ended after"):
        audit_split(tmp_path / "run.bin", bottom=world / "bottom0", privatizer=OPEN)


@pytest.mark.parametrize("eta", [None, 300.0])
def test_texts_that_were_only_predicted_are_taken_for_no_training_text(world, tmp_path, eta):
    privatizer = OPEN if eta is None else PrivatizerConfig(privatizer="vector", eta=eta)
    bottom = open_bottom(world / "bottom0")
    texts = read_training(bottom, world / "train.csv", ReadingConfig())
    private = privatize(bottom, texts.ids, texts.labels, mechanism=privatizer.mechanism(eta))
    others = [f"any {noun} as {trait}" for noun in NOUNS[:6] for trait in TRAITS[:5]]
    asked = privatize(bottom, others, mechanism=privatizer.mechanism(eta))
    assert {len(text) for text in asked.ids} & {len(text) for text in private.ids}
    recorded(private, [range(30)], [asked]).save(tmp_path / "run.bin")
    found = audit_split(
        tmp_path / "run.bin", bottom=world / "bottom0", data=world / "train.csv",
        privatizer=privatizer, config=AuditConfig(fresh_draws=1),
    )  # fmt: skip
    assert eps(found)["nearest neighbour"].value <= (0 if eta is None else 0.05)
    assert found.facts["left out"] == "30 texts that were only predicted are left out"


def test_a_transcript_of_predictions_alone_is_refused(world, tmp_path):
    asked = privatize(open_bottom(world / "bottom0"), sentences(3, 5), mechanism=None)
    recorded(asked, [], [asked]).save(tmp_path / "run.bin")
    with pytest.raises(DataError, match="3 texts that were only predicted: audit the bottom"):
        audit_split(
            tmp_path / "run.bin", bottom=world / "bottom0", data=world / "train.csv",
            privatizer=OPEN,
        )  # fmt: skip


VECTOR = PrivatizerConfig(privatizer="vector", eta=14.0)


def is_averaged(found, texts):
    """Draws of so many texts that were sent, where they count as what they are, the strongest."""
    best = found.findings[found.strongest]
    said = re.fullmatch(rf"averaging (\d+) draws of {texts} texts", best.attack)
    assert said is not None
    assert best.value < 0.8 * eps(found)["nearest neighbour"].low
    assert best.attack in found.verdict
    assert not any("You send one draw" in f.knew for f in found.findings)
    return int(said[1])


def test_other_draws_of_the_same_texts_are_averaged(world, tmp_path):
    bottom, noise = open_bottom(world / "bottom0"), VECTOR.mechanism(14.0)
    texts = read_training(bottom, world / "train.csv", ReadingConfig())
    private = privatize(bottom, texts.ids, texts.labels, mechanism=noise)
    asked = [privatize(bottom, texts.ids, mechanism=noise) for _ in range(7)]
    recorded(private, [range(30)], asked).save(tmp_path / "run.bin")
    found = audit_split(
        tmp_path / "run.bin", bottom=world / "bottom0", data=world / "train.csv",
        privatizer=VECTOR, config=AuditConfig(fresh_draws=2, test_tokens=100_000),
    )  # fmt: skip
    draws = is_averaged(found, 30)
    assert 225 < draws <= 240  # hardly one is not recognised
    assert found.findings[found.strongest].value < 0.03
    assert found.facts["attacked"].startswith("30 texts")  # each once
    assert found.facts["drawn again"].startswith(f"{draws - 30} of them")


def test_a_jobs_predicted_texts_are_other_draws_of_its_own(world, tmp_path):
    job, bottom = job_of(world, tmp_path / "job", VECTOR, 14.0), open_bottom(world / "bottom0")
    some, others = job.states().ids[:20], [torch.arange(5, 9), torch.arange(5, 10)]
    for k in range(5):
        asked = privatize(bottom, [*some[k:], *others], mechanism=VECTOR.mechanism(14.0))
        asked.save(job.asked_path(f"{k:016}"))
    found = audit_split(job.path, config=AuditConfig(fresh_draws=2, test_tokens=100_000))
    assert is_averaged(found, 20) == 20 + 20 + 19 + 18 + 17 + 16
    assert found.facts["left out"] == "2 texts that were only predicted are left out"


def test_a_text_that_stands_twice_is_drawn_twice(world, tmp_path):
    write_labelled(tmp_path / "train.csv", different(10, 1) * 6)
    found = audit_split(
        world / "bottom0", data=tmp_path / "train.csv", privatizer=VECTOR,
        config=AuditConfig(fresh_draws=2, test_tokens=100_000),
    )  # fmt: skip
    assert is_averaged(found, 10) == 60


def test_what_is_missing_is_asked_for(world):
    with pytest.raises(ConfigError, match="--data"):
        audit_split(world / "bottom0", privatizer=OPEN)
    with pytest.raises(ConfigError, match="changed_share"):
        audit_split(world / "bottom0", data=world / "train.csv")
    with pytest.raises(ConfigError, match="labelled texts"):
        audit_split(
            world / "bottom0", data=world / "public.txt",
            privatizer=PrivatizerConfig(eta=1.0, cti_fraction=0.1),
        )  # fmt: skip


def test_the_page_holds_every_sentence(world):
    found = audited(world, public=world / "public.txt")
    html = render(page(found))
    assert all(f.knew in html and f.meaning in html for f in found.findings)
    assert all(s.attack in html and s.needs in html for s in found.not_run)
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_too_little_public_text_is_told_from_none(world, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("\n".join(sentences(5, 2)))
    short = replace(CONFIG, public_tokens=50)
    for public, config, said in (
        (None, CONFIG, "--public, with at least 20 texts of the kind that yours are"),
        (world / "public.txt", short, "20 public texts, 3 were left within --public-tokens 50: "
         "raise it"),
        (few, CONFIG, "20 public texts, --public holds 5: give more"),
    ):  # fmt: skip
        found = audited(world, public=public, config=config)
        assert next(s.needs for s in found.not_run if s.attack == "trained inverter") == said


@pytest.mark.parametrize("ended", [None, True, False])
def test_a_training_that_was_ended_is_told_in_the_verdict(world, monkeypatch, ended):
    def trained(view, config):  # `ended`: which of the two inverters
        inverter, result = train_inverter(view, config)
        return inverter, replace(result, settled=config.adaptive is not ended)

    monkeypatch.setattr(split_attacks, "train_inverter", trained)
    noise = PrivatizerConfig(privatizer="exponential", changed_share=0.5)
    found = audited(world, "bottom1", noise, public=world / "public.txt")
    assert ("ended by --attack-seconds" in found.verdict) == (ended is not None)
    by = {f.attack: "ended by" in f.meaning for f in found.findings if f.measure == "EP"}
    assert by["Bayes"] == (ended is not None)
    assert by["trained inverter"] == (ended is True)


def test_the_strongest_at_each_figure_is_named():
    ids = (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 1, 1, 2]))
    common = torch.tensor([1])

    def scored(attack, *guess):
        guess = tuple(map(torch.tensor, guess))
        attempt = Attempt(attack=attack, knew="", guess=guess)
        return attempt, empirical_privacy(guess, ids, common=common)

    most = scored("most", [1, 2, 0, 0], [1, 1, 1, 0])
    whole = scored("whole", [1, 2, 3, 4], [0, 0, 0, 0])
    first, rare = _verdict([most, whole], None)
    assert first.startswith("The strongest attack, most, reads 62.5%")
    assert first.endswith("1 of 2 texts come out whole by whole.")
    assert rare == "Of the words beside the commonest the strongest there, whole, reads 75.0%."
    assert _verdict([most, most], None)[1].startswith("Of the words beside the commonest it reads")


def test_texts_are_spread_evenly():
    ids = [torch.zeros(n, dtype=torch.int64) for n in (4, 6) * 10]
    assert spread_texts(ids, 25) == [0, 4, 8, 12, 16]
    assert len(spread_texts(ids, 1)) == 2
    assert spread_texts(ids, 10**6) == list(range(20))
