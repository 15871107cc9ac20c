"""What an adversary of split tuning does on request: a language model, an attribute, a search."""

import csv
import json
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from blindtune.attacks import language_prior
from blindtune.attacks.adversary import Candidates
from blindtune.attacks.language_prior import CausalPrior, decode, right_by_weight
from blindtune.attacks.spelled_prior import SpelledPrior
from blindtune.errors import ConfigError, DataError, ModelError
from blindtune.evaluation.audits import estimate, language_attack
from blindtune.evaluation.audits.attribute_attack import ATTACK, MEASURE, read_attribute
from blindtune.evaluation.audits.audit import AdversaryConfig, AuditConfig
from blindtune.evaluation.audits.estimate import estimate_audit_split
from blindtune.evaluation.audits.split import audit_split
from blindtune.evaluation.audits.split_attacks import FEWEST_PUBLIC
from blindtune.evaluation.audits.split_subject import read_audited
from blindtune.models.costs import weight_bytes
from blindtune.models.decoder import Decoder
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.partition import Cut
from tiny_encoders import tiny_encoder
from tiny_models import tiny_model, tiny_tokenizer

OPEN = PrivatizerConfig(privatizer="none", unprotected=True)
NOISE = PrivatizerConfig(privatizer="token", eta=0.01)
CONFIG = AuditConfig(attack_seconds=3.0, fresh_draws=1, test_tokens=600)
PATIENT = AuditConfig(attack_seconds=20.0, fresh_draws=1, test_tokens=600)
NOUNS = ("film", "story", "actor", "ending", "plot", "scene", "music", "joke")
TRAITS = ("good", "bad", "dull", "fine", "slow", "great", "odd", "sad")


def rows(count, seed):
    """Sentences with an author, who writes of one half of the nouns, and a die's fall."""
    draw = random.Random(seed)
    for _ in range(count):
        noun = draw.choice(NOUNS)
        author = "ada" if NOUNS.index(noun) < 4 else "bob"
        yield f"the {noun} is {draw.choice(TRAITS)}", author, draw.choice("ab")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Bottoms at cut 0 and 1, private and public rows, a model that has learned the language."""
    place = tmp_path_factory.mktemp("adversary")
    for cut in (0, 1):
        write_bottom(tiny_encoder("bert"), tiny_tokenizer(), place / f"bottom{cut}",
                     Cut(layers=3, cut=cut))  # fmt: skip
    for name, count, seed in (("private", 40, 1), ("public", 120, 2)):
        with (place / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "author", "die"])
            table.writerows(rows(count, seed))
    tokenizer, model = tiny_tokenizer(), tiny_model("smollm2")
    ids_BL = tokenizer([text for text, *_ in rows(64, 3)], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        logits_BLV = model(**ids_BL).logits[:, :-1]
        mask_BL = ids_BL["attention_mask"][:, 1:].bool()
        loss = cross_entropy(logits_BLV[mask_BL], ids_BL["input_ids"][:, 1:][mask_BL])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


def audited(world, cut=0, privatizer=OPEN, public=True, config=CONFIG, length=128, **asked):
    return audit_split(
        world / f"bottom{cut}", data=world / "private.csv", privatizer=privatizer, config=config,
        public=world / "public.csv" if public else None, adversary=AdversaryConfig(**asked),
        reading=ReadingConfig(max_length=length),
    )  # fmt: skip


def eps(found, measure="EP"):
    return {f.attack: f for f in found.findings if f.measure == measure}


def test_a_model_that_knows_the_language_reads_more_than_likelihoods_alone(world):
    some = PrivatizerConfig(privatizer="token", changed_share=0.5)
    every = eps(audited(world, privatizer=some, config=PATIENT, prior=str(world / "model")))
    for attack in ("Bayes", "trained inverter"):
        assert every[f"{attack}, language model"].value < every[attack].value + 0.05
        assert "weighed by a causal language model" in every[f"{attack}, language model"].knew
    assert every["Bayes, language model"].value < every["nearest neighbour"].value
    assert every["Bayes, language model"].value < every["Bayes"].value - 0.05


def test_under_pure_noise_a_model_reads_what_the_language_alone_tells(world):
    found = audited(world, privatizer=NOISE, prior=str(world / "model"))
    every = eps(found)
    assert every["Bayes, language model"].value > 1 - best_blind_guess(world) - 0.05
    assert eps(found, "EP, whole texts")["Bayes, language model"].value > 0.8


def best_blind_guess(world):
    """Share of tokens that are as the commonest at their place in texts as long."""
    bottom = open_bottom(world / "bottom0")
    texts = read_audited(bottom, world / "private.csv", ReadingConfig()).ids
    content = [bottom.margins.content(text).tolist() for text in texts]
    columns = defaultdict(Counter)
    for text in content:
        for place, word in enumerate(text):
            columns[len(text), place][word] += 1
    return sum(max(words.values()) for words in columns.values()) / sum(map(len, content))


def test_texts_that_a_model_does_not_come_to_are_read_without_it(world, monkeypatch):
    some = PrivatizerConfig(privatizer="token", changed_share=0.5)
    config = AuditConfig(attack_seconds=1e-6, fresh_draws=1, test_tokens=600)
    for rehearsal, says in (
        (None, "before it read a text: it is left out"),
        ((0.4, 5), "ended it after 0 of "),
        ((0.0, 5), "the language model read no more"),
    ):
        if rehearsal:
            monkeypatch.setattr(language_attack, "_rehearse", lambda *_, said=rehearsal: said)
        found = audited(world, privatizer=some, config=config, prior=str(world / "model"))
        assert says in eps(found)["Bayes, language model"].meaning
        assert eps(found)["Bayes, language model"].value == eps(found)["Bayes"].value


class Slow:
    """A prior that takes a second a word, by a clock of its own, and knows which words are right.

    Likelihoods are a little for the other words.
    """

    def __init__(self, right=5):
        self.now, self.right = 0.0, right

    def monotonic(self):
        return self.now

    def log_probabilities(self, before_BL, word_BK):
        self.now += 1.0
        return torch.where(word_BK == self.right, 0.0, -9.0)

    def forget(self):
        pass


@pytest.mark.parametrize(
    ("seconds", "read", "says"),
    [
        (1.0, 0, "before it read a text: it is left out"),  # two words a text
        (5.0, 8, "ended it after 8 of 20 texts"),
        (6.5, 8, "ended it after 8 of 20 texts"),  # in the midst of the next eight
        (100.0, 20, ""),
    ],
)
def test_a_slow_model_keeps_to_its_time(monkeypatch, seconds, read, says):
    words, seen = torch.tensor([[9, 5]] * 2), torch.tensor([[0.0, -0.1]] * 2)
    found = Candidates(words=(words,) * 20, log_likelihoods=(seen,) * 20)
    some = Candidates(words=(words,) * 4, log_likelihoods=(seen,) * 4)
    slow = Slow()
    for module in (language_attack, language_prior):
        monkeypatch.setattr(module, "time", slow)
    known = [torch.tensor([5, 5])] * 4
    guess, note = language_attack.weighed(found, some, known, slow, seconds)
    assert slow.now <= seconds + 1
    assert [text.tolist() for text in guess] == [[5, 5]] * read + [[9, 9]] * (20 - read)
    assert says in note
    assert bool(says) == bool(note)


def test_a_prior_of_few_positions_reads_texts_of_as_many_and_longer(world, tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("gpt2", n_positions=8).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [torch.arange(5, 5 + length) for length in (3, 8, 12)]
    prior = language_attack.open_prior(tmp_path, open_bottom(world / "bottom0"), texts)
    words = tuple(torch.stack([text, text + 1], 1) for text in texts)
    seen = tuple(torch.zeros(len(text), 2) for text in texts)
    guess = decode(Candidates(words=words, log_likelihoods=seen), prior)
    assert list(map(len, guess)) == [3, 8, 12]


def test_a_model_of_other_words_spells_them(world, tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    write_bottom(tiny_encoder("bert"), other, tmp_path / "bottom", Cut(layers=3, cut=0))
    prior = language_attack.open_prior(world / "model", open_bottom(tmp_path / "bottom"))
    assert isinstance(prior, SpelledPrior)
    with pytest.raises(ModelError, match="expected"):
        audited(world, prior=str(world / "bottom0"))


def test_an_attribute_is_read_of_undefended_texts(world):
    found = audited(world, cut=1, attribute_column="author")
    of = eps(found, MEASURE)
    assert list(of) == [ATTACK, "commonest value, no attack"]
    assert of[ATTACK].value < 0.2 < of["commonest value, no attack"].value
    assert "of 2 values; saying the commonest each time gets" in of[ATTACK].meaning
    assert "Attribute inference: got the author of" in found.verdict


@pytest.mark.parametrize(("privatizer", "column"), [(NOISE, "author"), (OPEN, "die")])
def test_an_attribute_that_states_do_not_carry_is_not_read(world, privatizer, column):
    """Texts are cut to one length: no noise hides it, and the authors' differ."""
    found = audited(world, privatizer=privatizer, length=14, attribute_column=column)
    of = eps(found, MEASURE)
    assert of[ATTACK].high > of["commonest value, no attack"].value - 0.05
    assert of[ATTACK].value > 0.25


def test_attributes_stay_with_their_texts(world, tmp_path):
    """Values are all different, and half of the private ones are known to the adversary."""
    texts = [f"the {noun} is {trait}" for noun in NOUNS for trait in TRAITS]
    for name, skipped in (("public", 0), ("private", 32)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "noun"])
            for text in texts:
                place = NOUNS.index(text.split()[1])
                table.writerow(["", "nobody"])  # rows without a text are read past
                table.writerow([text, "" if name == "private" and place < skipped / 8 else place])
    found = audit_split(
        world / "bottom0", data=tmp_path / "private.csv", public=tmp_path / "public.csv",
        privatizer=OPEN, config=AuditConfig(fresh_draws=1, test_tokens=200, public_tokens=10**5),
        adversary=AdversaryConfig(attribute_column="noun"),
    )  # fmt: skip
    best = eps(found, MEASURE)[ATTACK]
    assert best.value < 0.3
    assert "of 8 values" in best.meaning
    assert "texts without a value that public text has are left out" in best.meaning


def test_attributes_that_cannot_be_learned_are_refused(world, tmp_path):
    with pytest.raises(DataError, match="values in the column 'nobody', got none"):
        audited(world, attribute_column="nobody")
    lines = (world / "public.csv").read_text().splitlines()
    (tmp_path / "one.csv").write_text("\n".join(line for line in lines if ",bob," not in line))
    with pytest.raises(DataError, match="at least two values of 'author', got 1"):
        audit_split(
            world / "bottom0", data=world / "private.csv", public=tmp_path / "one.csv",
            privatizer=OPEN, config=CONFIG, adversary=AdversaryConfig(attribute_column="author"),
        )  # fmt: skip
    (tmp_path / "text.txt").write_text("the film is good\nthe plot is bad\n")
    with pytest.raises(DataError, match=r"ending in .jsonl, .csv or .parquet"):
        audit_split(
            world / "bottom0", data=world / "private.csv", public=tmp_path / "text.txt",
            privatizer=OPEN, config=CONFIG, adversary=AdversaryConfig(attribute_column="author"),
        )  # fmt: skip


def rewritten(world, path, name, change):
    """Rows of a file of the world with other authors: of row `k`, `change(k, author)`."""
    with (world / f"{name}.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.dumps(row | {"author": change(k, row["author"])}) for k, row in enumerate(table)]
    path.write_text("\n".join(lines))
    return path


def test_values_that_public_text_lacks_are_refused_before_an_attack_runs(world, tmp_path):
    told = []
    private = rewritten(world, tmp_path / "private.jsonl", "private", lambda *_: "secret")
    public = rewritten(world, tmp_path / "public.jsonl", "public", lambda _, name: name + "\x1b[2J")
    asked = {
        "data": private, "public": public, "config": CONFIG,
        "adversary": AdversaryConfig(attribute_column="author"),
    }  # fmt: skip
    says = r"got none: it has ada\?\[2J, bob\?\[2J; give public text with values of yours"
    with pytest.raises(DataError, match=says) as caught:
        audit_split(
            world / "bottom0", **asked, privatizer=OPEN, on_progress=lambda *step: told.append(step)
        )
    assert not told
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match=says):
        estimate_audit_split(world / "bottom0", **asked, privatizer=OPEN)


def test_few_public_texts_with_a_value_are_too_few_to_learn_from(world, tmp_path):
    public = rewritten(
        world, tmp_path / "public.jsonl", "public", lambda k, name: name if k < FEWEST_PUBLIC - 1
        else None,
    )  # fmt: skip
    found = audit_split(
        world / "bottom0", data=world / "private.csv", public=public, privatizer=OPEN,
        config=AuditConfig(fresh_draws=1, test_tokens=200, attack_seconds=1, public_tokens=10**5),
        adversary=AdversaryConfig(attribute_column="author"),
    )  # fmt: skip
    assert not eps(found, MEASURE)
    listed = {skip.attack: skip.needs for skip in found.not_run}
    assert listed[ATTACK].startswith("20 public texts with a value of 'author', 19 of 120 have one")


def test_values_are_read_as_they_are_meant(tmp_path):
    path = tmp_path / "rows.jsonl"
    raw = [1, 1.0, "1.0", " 1 ", 0.5, "ada", math.nan, "  ", "", None]
    path.write_text("\n".join(json.dumps({"text": "a film", "author": value}) for value in raw))
    values = read_attribute(path, "author", ReadingConfig())
    assert values == ("1", "1", "1", "1", "0.5", "ada", None, None, None, None)


@pytest.mark.parametrize(
    ("value", "kind"), [(True, "bool"), (["x"], "a list of 1"), ({"x": 1}, "a dict of 1")]
)
def test_values_that_are_no_names_are_refused(tmp_path, value, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a film", "author": value}))
    with pytest.raises(DataError, match=f"rows.jsonl:1: .* in 'author', got {kind}: name another"):
        read_attribute(path, "author", ReadingConfig())


@pytest.mark.parametrize("public", [True, False])
def test_dummies_read_behind_a_block_what_their_start_did_not(world, public):
    every = eps(audited(world, cut=1, public=public, config=PATIENT, dummies=True))
    start = every["trained inverter" if public else "nearest neighbour"]
    assert every["dummy embeddings"].value <= start.value
    assert every["dummy embeddings"].value < 0.1


def test_dummies_find_no_more_than_was_sent(world):
    every = eps(audited(world, cut=1, privatizer=NOISE, dummies=True))
    assert every["dummy embeddings"].value > 0.6
    assert "words that were sent, not those that were meant" in every["dummy embeddings"].meaning


def test_what_was_not_asked_for_is_listed_with_its_option(world):
    listed = {skip.attack: skip.needs for skip in audited(world, cut=1).not_run}
    assert listed["dummy embeddings"].startswith("--dummies")
    assert listed["language model"].startswith("--prior")
    assert listed[ATTACK].startswith("--attribute-column")
    assert "dummy embeddings" not in {skip.attack for skip in audited(world).not_run}
    few = audit_split(
        world / "bottom0", data=world / "private.csv", public=world / "public.csv", privatizer=OPEN,
        config=AuditConfig(fresh_draws=1, public_tokens=60),
        adversary=AdversaryConfig(prior=str(world / "model"), attribute_column="author"),
    )  # fmt: skip
    listed = {skip.attack: skip.needs for skip in few.not_run}
    assert "--public-tokens 60" in listed["language model"]
    assert "--public-tokens 60" in listed[ATTACK]
    alone = {skip.attack: skip.needs for skip in audited(world, public=False).not_run}
    for attack in ("language model", ATTACK):
        assert alone[attack].endswith("; and --public, with at least 20 texts of the kind that "
                                      "yours are")  # fmt: skip


def test_windows_of_a_language_model_have_no_attribute(world, tmp_path):
    tokenizer, cut = tiny_tokenizer(), Cut(partition="u-shape", layers=8, cut=1)
    write_bottom(tiny_model("smollm2"), tokenizer, tmp_path / "bottom", cut)
    (tmp_path / "text.txt").write_text("\n".join(text for text, *_ in rows(40, 4)))
    reading = ReadingConfig(task="language-model", max_length=16)
    files = {"data": tmp_path / "text.txt", "config": CONFIG, "reading": reading}
    found = audit_split(tmp_path / "bottom", **files, privatizer=OPEN)
    assert ATTACK not in {skip.attack for skip in found.not_run}
    files |= {"public": tmp_path / "text.txt"}
    files |= {"adversary": AdversaryConfig(attribute_column="author")}
    with pytest.raises(ConfigError, match="for a task of texts, got the windows"):
        audit_split(tmp_path / "bottom", **files, privatizer=OPEN)
    with pytest.raises(ConfigError, match="for a task of texts, got the windows"):
        estimate_audit_split(tmp_path / "bottom", **files, privatizer=OPEN)


@pytest.mark.parametrize(
    ("cut", "asked", "says"),
    [
        (0, {"dummies": True}, "cut at 0, where the nearest neighbour"),
        (1, {"prior": "smollm2-135m"}, "expected --public for --prior"),
        (1, {"attribute_column": "author"}, "expected --public for --attribute-column"),
    ],
)
def test_what_this_adversary_cannot_do_is_refused_before_anything_runs(world, cut, asked, says):
    with pytest.raises(ConfigError, match=says):
        audited(world, cut=cut, public=False, **asked)
    with pytest.raises(ConfigError, match=says):
        estimate_audit_split(
            world / f"bottom{cut}", data=world / "private.csv", privatizer=OPEN,
            adversary=AdversaryConfig(**asked),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="expected a name as prior"):
        AdversaryConfig(prior="")


def test_an_estimate_has_a_part_for_each(world):
    asked = AdversaryConfig(prior=str(world / "model"), attribute_column="author", dummies=True)
    files = {"data": world / "private.csv", "public": world / "public.csv"}
    plain, more = (
        estimate_audit_split(
            world / "bottom1",
            **files,
            privatizer=OPEN,
            reading=ReadingConfig(),
            config=CONFIG,
            adversary=adversary,
        )
        for adversary in (None, asked)
    )
    assert set(more.parts) - set(plain.parts) == {
        "dummy embeddings, at most", "attribute inference, at most", "load the language model",
        "language model, at most",
    }  # fmt: skip
    assert more.parts["language model, at most"] <= 2 * CONFIG.attack_seconds
    assert more.memory_bytes > plain.memory_bytes


@pytest.mark.parametrize(
    ("privatizer", "parts"),
    [
        (OPEN, set()),
        (PrivatizerConfig(privatizer="vector", eta=9.0), {"fresh draws", "noise of public text"}),
        (PrivatizerConfig(eta=9.0), {"fresh draws", "noise of public text", "Bayes"}),
        (PrivatizerConfig(public_text="words.txt"), {"word groups"}),
        (
            PrivatizerConfig(public_text="words.txt", eta=9.0),
            {"word groups", "fresh draws", "noise of public text", "Bayes"},
        ),
    ],
)
def test_an_estimate_has_what_fits_the_privatizer(world, privatizer, parts):
    found = estimate_audit_split(
        world / "bottom0", data=world / "private.csv", public=world / "public.csv",
        privatizer=privatizer, config=replace(CONFIG, fresh_draws=2),
    ).parts  # fmt: skip
    assert set(found) == {"open", "nearest neighbour", "training, at most"} | parts


@pytest.mark.parametrize(
    ("privatizer", "networks", "attacks"),
    [
        (OPEN, 1, 2),
        (PrivatizerConfig(privatizer="vector", eta=9.0), 1, 2),
        (PrivatizerConfig(eta=9.0), 2, 2),
        (PrivatizerConfig(public_text="words.txt"), 2, 2),
        (PrivatizerConfig(public_text="words.txt", eta=9.0), 2, 3),
    ],
)
def test_an_estimate_counts_every_training_behind_layers(world, privatizer, networks, attacks):
    parts = estimate_audit_split(
        world / "bottom1", data=world / "private.csv", public=world / "public.csv",
        privatizer=privatizer, config=replace(CONFIG, attack_seconds=1e-6),
        adversary=AdversaryConfig(prior=str(world / "model")),
    ).parts  # fmt: skip
    assert parts["training, at most"] == pytest.approx(networks * 1e-6)
    assert parts["language model, at most"] == pytest.approx(attacks * 1e-6)


def test_what_an_audit_would_not_look_at_is_refused(world):
    with pytest.raises(ConfigError, match="expected a job or a transcript with bottom"):
        audit_split(
            world / "bottom1", bottom=world / "bottom0", data=world / "private.csv",
            privatizer=OPEN, config=CONFIG,
        )  # fmt: skip


def test_an_estimate_refuses_what_an_audit_would(world):
    with pytest.raises(ConfigError, match="expected public_text, eta"):
        estimate_audit_split(world / "bottom0", data=world / "private.csv")


@pytest.mark.parametrize("name", ["smollm2", "gpt2", "gpt_neox"])
def test_an_estimate_counts_the_keys_and_values_of_every_beam(monkeypatch, name):
    model, kept, rows = tiny_model(name), [], []
    forward = model.forward

    def watched(**given):
        out = forward(**given)
        layers = given["past_key_values"].layers
        kept.append(sum(4 * (one.keys.numel() + one.values.numel()) for one in layers))
        rows.append(len(given["input_ids"]))
        return out

    monkeypatch.setattr(model, "forward", watched)
    draw = torch.Generator().manual_seed(0)
    words = tuple(torch.randint(3, 128, (40, 20), generator=draw) for _ in range(8))
    found = Candidates(words=words, log_likelihoods=tuple(torch.zeros(40, 20) for _ in words))
    prior = CausalPrior(Decoder(model), 1)
    decode(found, prior)
    right_by_weight(found, [text[:, 0] for text in words], prior)
    assert max(rows) <= 64
    a_token = kept[rows.index(max(rows))] / max(rows) / (1 + rows.index(max(rows)))
    grown = estimate.weighing_bytes(model, 40) - estimate.weighing_bytes(model, 8)
    assert grown == pytest.approx(2 * 64 * 32 * a_token)  # twice while they change their order
    rest = estimate.weighing_bytes(model, 40) - weight_bytes(model)
    assert rest > max(kept)
    assert estimate.weighing_bytes(model, 40, spelled=True) > weight_bytes(model) + rest


def test_an_estimate_reckons_with_the_longest_text_that_a_model_weighs(world, monkeypatch):
    asked = []
    monkeypatch.setattr(
        estimate, "weighing_bytes", lambda _, longest, **_spelled: asked.append(longest) or 10**12
    )
    bottom = open_bottom(world / "bottom0")
    read = {
        n: read_audited(bottom, world / f"{n}.csv", ReadingConfig()) for n in ("private", "public")
    }
    for data in ("private", "public"):
        memory = estimate_audit_split(
            world / "bottom0", data=world / f"{data}.csv", public=world / "public.csv",
            privatizer=OPEN, config=CONFIG,
            adversary=AdversaryConfig(prior=str(world / "model")),
        ).memory_bytes  # fmt: skip
        assert memory > 10**12
    longest = {name: max(map(len, texts.ids)) for name, texts in read.items()}
    assert asked == [max(longest.values()), longest["public"]]
