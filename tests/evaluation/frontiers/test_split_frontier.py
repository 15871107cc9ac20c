"""The frontier of split tuning: what it measures, keeps, and answers."""

import csv
import json
from dataclasses import replace

import pytest

from blindtune.attacks.trained_inversion import train_inverter
from blindtune.cli.main import run
from blindtune.errors import ConfigError
from blindtune.evaluation.audits import split_attacks
from blindtune.evaluation.audits.audit import AdversaryConfig, AuditConfig
from blindtune.evaluation.frontiers import split as module
from blindtune.evaluation.frontiers.split import (
    SplitFrontier,
    SplitFrontierConfig,
    SplitSetting,
    Trial,
    split_frontier,
)
from blindtune.evaluation.pages.split_frontier import answer_sentence, write_split_frontier
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.requests import PassConfig
from tiny_encoders import tiny_encoder
from tiny_models import tiny_model, tiny_tokenizer

NOUNS, TRAITS = ("film", "story", "actor", "plot", "music"), ("good", "bad", "dull", "fine", "odd")
TEXTS = [f"the {noun} is {trait}" for noun in NOUNS for trait in TRAITS]
LABELS = [TRAITS.index(text.split()[-1]) % 2 for text in TEXTS]
QUICK = SplitFrontierConfig(
    cut=(0, 1),
    eta=(2.0, 500.0),
    privatizer="token",
)
TRIAL = Trial(
    passes=PassConfig(batch_size=4), trying=AuditConfig(test_tokens=200, attack_seconds=0.5)
)


def write(path, texts, labels):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("split-frontier")
    tiny_encoder("bert").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    write(place / "train.csv", TEXTS, LABELS)
    write(place / "test.csv", TEXTS[:6], LABELS[:6])
    tiny_model("llama").save_pretrained(place / "language")
    tiny_tokenizer().save_pretrained(place / "language")
    (place / "public.txt").write_text("\n".join(TEXTS * 3))
    return place


def swept(world, out, config, **options):
    options.setdefault("trial", TRIAL)
    return split_frontier(
        world / "model", world / "train.csv", world / "test.csv", out, config, **options
    )


def test_what_is_measured_and_kept(world, tmp_path, monkeypatch):
    told = []
    found = swept(world, tmp_path, QUICK, on_row=lambda *row: told.append(row))
    assert [s.name for s in found.settings] == [
        f"cut {cut}, {noise}" for cut in (0, 1) for noise in ("no noise", "eta 500", "eta 2")
    ]
    by_name = {s.name: s for s in found.settings}
    assert by_name["cut 0, no noise"].ep == 0  # the embeddings are read back
    assert by_name["cut 0, eta 500"].ep < 0.1
    assert by_name["cut 0, eta 2"].ep > 0.5
    assert all(0 <= s.ua <= 1 and s.ep_low <= s.ep <= s.ep_nearest for s in found.settings)
    assert told[0] == ("settings", 0, 6)
    assert told[-1] == ("settings", 6, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    monkeypatch.setattr(module, "split_tune", None)  # nothing is run again
    assert swept(world, tmp_path, QUICK) == found
    with pytest.raises(TypeError):
        swept(world, tmp_path, QUICK, trial=replace(TRIAL, passes=PassConfig(epochs=2)))


def test_public_text_arms_the_attacker(world, tmp_path):
    config = replace(QUICK, cut=(0,), eta=(20.0,))
    found = swept(world, tmp_path, config, public=world / "public.txt")
    assert found.settings[1].strongest != "nearest neighbour"
    assert found.settings[1].ep < found.settings[1].ep_nearest


def test_every_attack_is_run_that_is_asked_for(world, tmp_path, monkeypatch):
    """And rows are kept by what the language model is, not by its name."""
    asked = AdversaryConfig(prior=str(world / "language"), dummies=True)
    few = replace(TRIAL.trying, test_tokens=40)
    trial, config = replace(TRIAL, adversary=asked, trying=few), replace(QUICK, eta=(20.0,))
    seen = []
    real = module.audit_split

    def audit(*subject, **options):
        seen.append(real(*subject, **options))
        return seen[-1]

    monkeypatch.setattr(module, "audit_split", audit)
    found = swept(world, tmp_path / "f", config, public=world / "public.txt", trial=trial)
    assert [s.not_run for s in found.settings] == [()] * 4
    attacks = [" ".join(f.attack for f in audit.findings) for audit in seen]
    assert ["dummy" in names for names in attacks] == [False, False, True, True]
    assert "language model" in attacks[1]
    monkeypatch.setattr(module, "split_tune", None)  # nothing is run again
    (world / "language").rename(tmp_path / "moved")
    moved = replace(trial, adversary=replace(asked, prior=str(tmp_path / "moved")))
    again = swept(world, tmp_path / "f", config, public=world / "public.txt", trial=moved)
    (tmp_path / "moved").rename(world / "language")
    assert again.settings == found.settings
    with pytest.raises(TypeError):
        swept(world, tmp_path / "f", config, public=world / "public.txt")


def test_an_adversary_that_could_do_nothing_is_refused(world, tmp_path, capsys):
    files = ["--data", str(world / "train.csv"), "--test", str(world / "test.csv")]
    call = ["split-frontier", str(world / "model"), *files, "--out", str(tmp_path / "f")]
    for more, says in (
        (["--prior", str(world / "language")], "expected --public for --prior"),
        (["--dummies", "--cut", "0"], "expected a cut above 0 for --dummies"),
    ):
        for dry in ([], ["--dry-run"]):
            assert run([*call, *more, *dry]) == 2
            assert says in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leave attribute_column"):
        Trial(adversary=AdversaryConfig(attribute_column="author"))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("settled", [True, False])
def test_an_attack_that_was_ended_is_marked(world, tmp_path, monkeypatch, settled):
    def ended(*args):
        inverter, result = train_inverter(*args)
        return inverter, replace(result, settled=settled)

    monkeypatch.setattr(split_attacks, "train_inverter", ended)
    config = replace(QUICK, cut=(0,), eta=(20.0,))
    found = swept(world, tmp_path, config, public=world / "public.txt")
    assert {s.settled for s in found.settings} == {settled}
    write_split_frontier(found, tmp_path)
    page = (tmp_path / "split-frontier.html").read_text()
    assert ("ended by --attack-seconds" in page) != settled


def setting(eta, ua, ep, cut=0, cti=0.0, wrong=None):
    return SplitSetting(cut=cut, eta=eta, cti_fraction=cti, ua=ua, ep=ep, ep_low=max(0.0, ep - 0.1),
                        strongest="Bayes", ep_nearest=ep, settled=True,
                        wrong_guesses=wrong)  # fmt: skip


def test_groups_are_tried_beside_noise(world, tmp_path, monkeypatch):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(TEXTS * 150))
    config = replace(QUICK, cut=(0,), eta=(2.0,), public_text=str(words), wrong_guesses=(0.7, 0.4))
    found = swept(world, tmp_path / "f", config)
    names = ["cut 0, no noise", "cut 0, eta 2", "cut 0, groups 0.4", "cut 0, groups 0.7"]
    assert [s.name for s in found.settings] == names
    by_name = {s.name: s for s in found.settings}
    assert 0 < by_name["cut 0, groups 0.4"].ep <= by_name["cut 0, groups 0.7"].ep
    assert by_name["cut 0, groups 0.7"].eta is None
    assert found.best_ua == by_name["cut 0, no noise"].ua
    write_split_frontier(found, tmp_path / "f")
    assert "a guess by frequency gets wrong" in (tmp_path / "f" / "split-frontier.html").read_text()
    words.rename(tmp_path / "moved.txt")
    moved = replace(config, public_text=str(tmp_path / "moved.txt"))
    monkeypatch.setattr(module, "split_tune", None)  # nothing is run again
    assert swept(world, tmp_path / "f", moved).settings == found.settings
    (tmp_path / "moved.txt").write_text("\n".join(TEXTS * 151))
    with pytest.raises(TypeError):
        swept(world, tmp_path / "f", moved)


def test_groups_alone():
    config = SplitFrontierConfig(privatizer="groups", public_text="public.txt")
    assert [p.privatizer for p in config.privatizers] == ["none", "groups", "groups"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"privatizer": "groups"}, "expected public_text"),
        ({"wrong_guesses": (0.5,)}, "expected public_text"),
        ({"eta": (9.0,), "changed_share": (0.3,)}, "got both"),
        ({"public_text": "public.txt", "wrong_guesses": ()}, "expected wrong_guesses"),
        ({"privatizer": "groups", "public_text": "p.txt", "eta": (15.0,)}, "leave eta"),
        ({"privatizer": "groups", "public_text": "p.txt", "cti_fraction": (0.01,)}, "leave eta"),
    ],
)
def test_what_a_sweep_would_ignore_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        SplitFrontierConfig(**options)


@pytest.mark.parametrize("task", ["regression", "language-model"])
def test_tasks_without_accuracy_are_refused(task):
    with pytest.raises(ConfigError, match=f"expected the task classification .* got {task}"):
        Trial(reading=ReadingConfig(task=task))


@pytest.mark.parametrize("dry", [True, False])
def test_bad_public_text_is_refused_before_anything_is_tuned(world, tmp_path, capsys, dry):
    files = ["--data", str(world / "train.csv"), "--test", str(world / "test.csv")]
    call = ["split-frontier", str(world / "model"), *files, "--out", str(tmp_path / "f")]
    (tmp_path / "short.txt").write_text("too few words")
    for name, says in (("short.txt", "at least 10,000 tokens"), ("org/set", "expected a file")):
        text = str(tmp_path / name) if name == "short.txt" else name
        assert run([*call, "--public-text", text, *["--dry-run"] * dry]) == 2
        assert says in capsys.readouterr().err


def test_texts_of_no_use_are_refused_before_anything_is_tuned(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "split_tune", None)
    bare, few = tmp_path / "bare.csv", tmp_path / "few.csv"
    bare.write_text("text\nno label here\nnor here\n")
    few.write_text("text,label\n" + "few words,good\nmore,bad\n" * 3)
    for files, says in (
        ({"test": bare}, "expected texts with labels to score on"),
        ({"public": few}, "20 public texts, --public holds 6"),
    ):
        names = {"test": world / "test.csv", "public": None} | files
        with pytest.raises(ConfigError, match=says):
            split_frontier(
                world / "model", world / "train.csv", names["test"], tmp_path / "f",
                replace(QUICK, cut=(0,), eta=(2.0,)), public=names["public"],
            )  # fmt: skip


def test_the_mildest_setting_is_the_answer():
    clear, mild, harsh = setting(None, 0.9, 0.0), setting(80.0, 0.8, 0.4), setting(40.0, 0.6, 0.8)
    spared, useless = setting(80.0, 0.85, 0.4, cti=0.01), setting(60.0, 0.5, 0.3)
    found = SplitFrontier(settings=(clear, mild, harsh, spared, useless), public=None)
    assert found.best_ua == 0.9
    assert found.mildest(0.3) == spared
    assert found.mildest(0.5) == harsh
    assert found.mildest(0.0) == clear
    assert found.mildest(0.9) is None
    assert found.efficient() == (clear, spared, harsh)
    fine, coarse = setting(None, 0.82, 0.4, wrong=0.5), setting(None, 0.7, 0.8, wrong=0.7)
    both = replace(found, settings=(*found.settings, coarse, fine), public="public.txt")
    assert both.best_ua == 0.9
    assert (both.mildest(0.3), both.mildest(0.5), both.mildest(0.0)) == (spared, coarse, clear)
    assert replace(both, settings=(harsh, fine)).mildest(0.3) == fine
    with pytest.raises(ConfigError, match="no attack looks into a group"):
        replace(both, public=None).mildest(0.3)
    missed = replace(coarse, not_run=("language model", "dummy embeddings"))
    more = "Not run, and may read more: language model (--prior), dummy embeddings (--dummies)."
    assert answer_sentence(both, missed, 0.5).endswith(more)
    said = answer_sentence(found, harsh, 0.5)
    assert "Not run" not in said
    assert "cut 0, eta 40: EP 0.800 under Bayes (at least 0.700" in said
    assert "30.0 points below" in said
    assert "the most private is cut 0, eta 40" in answer_sentence(found, None, 0.9)


def test_behind_layers_the_nearest_neighbour_answers_nothing(world, tmp_path, capsys):
    clear, deep = setting(None, 0.8, 0.0), setting(None, 0.8, 0.8, cut=5)
    with pytest.raises(ConfigError, match="--public to answer --ep at cut 5"):
        SplitFrontier(settings=(clear, deep), public=None).mildest(0.6)
    learned = SplitFrontier(settings=(clear, deep), public="public.txt")
    assert learned.mildest(0.6) == deep
    assert "may not hold" not in answer_sentence(learned, deep, 0.6)
    ended = replace(deep, settled=False)
    assert "ended by --attack-seconds" in answer_sentence(learned, ended, 0.6)
    files = ["--data", str(world / "train.csv"), "--test", str(world / "test.csv")]
    call = ["split-frontier", str(world / "model"), *files, "--cut", "0,1", "--ep", "0.6"]
    for more in ([], ["--dry-run"]):
        assert run([*call, "--out", str(tmp_path / "f"), *more]) == 2
        assert "only attacks that learn from text read much" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_contradictions_are_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="at least one cut"):
        SplitFrontierConfig(cut=())
    with pytest.raises(ConfigError, match="expected privatizer"):
        SplitFrontierConfig(privatizer="none")
    with pytest.raises(ConfigError, match="cut"):
        swept(world, tmp_path, replace(QUICK, cut=(0, 9)))
    assert list(tmp_path.iterdir()) == []


def test_on_the_command_line(world, tmp_path, capsys):
    options = [
        "--privatizer",
        "token",
        "--eta",
        "2,500",
        "--epochs",
        "1",
        "--attacked-tokens",
        "200",
        "--ep",
        "0.5",
    ]
    files = ["--data", str(world / "train.csv"), "--test", str(world / "test.csv")]
    call = ["split-frontier", str(world / "model"), *files, "--out", str(tmp_path / "f"), *options]
    assert run(call) == 0
    out = capsys.readouterr().out
    assert "The mildest setting that holds every attack at an EP of 0.5 is cut 0, eta 2" in out
    assert "attacks that learn from text were not run" in out
    assert "Not run, and may read more: language model (--prior)." in out
    facts = json.loads((tmp_path / "f" / "split-frontier.json").read_text())
    assert facts["answer"]["eta"] == 2
    page = (tmp_path / "f" / "split-frontier.html").read_text()
    assert "stronger attack than those tried" in page
    assert "attacks that learn from text were not run" in page


def test_what_it_will_take_is_estimated(world, tmp_path, capsys):
    files = ["--data", str(world / "train.csv"), "--test", str(world / "test.csv")]
    call = ["split-frontier", str(world / "model"), *files, "--out", str(tmp_path / "f")]
    call += ["--dry-run", "--json"]

    def parts(*more):
        assert run([*call, *more]) == 0
        return json.loads(capsys.readouterr().out)["estimate"]["parts"]

    few, many = parts("--eta", "9"), parts("--eta", "9,8,7", "--public", str(world / "public.txt"))
    assert "training, at most" not in few
    assert many["training, at most"] == 4 * 60
    assert not {"dummy embeddings, at most", "language model, at most"}.intersection(many)
    armed = parts(
        "--eta", "9", "--public", str(world / "public.txt"), "--cut", "0,1",
        "--prior", str(world / "language"), "--dummies",
    )  # fmt: skip
    assert armed["dummy embeddings, at most"] == 2 * 60
    assert 0 < armed["language model, at most"] <= 2 * 4 * 60
    (tmp_path / "words.txt").write_text("\n".join(TEXTS * 150))
    words = ["--public-text", str(tmp_path / "words.txt"), "--wrong-guesses", "0.5,0.6"]
    grouped = parts("--privatizer", "groups", *words)
    assert "word groups" in grouped
    assert "word groups" not in many
    assert not (tmp_path / "f").exists()


def test_an_interrupted_sweep_goes_on(world, tmp_path, monkeypatch, capsys):
    files = ["--data", str(world / "train.csv"), "--test", str(world / "test.csv")]
    call = ["split-frontier", str(world / "model"), *files, "--out", str(tmp_path / "f")]
    call += ["--eta", "2", "--epochs", "1", "--attacked-tokens", "200", "--json"]
    real, calls = module.split_tune, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, "split_tune", interrupted)
        assert run(call) == 130
        assert "run the same command again" in capsys.readouterr().err
        assert run(call) == 0
    assert len(calls) == 3
    assert len(json.loads(capsys.readouterr().out)["settings"]) == 2
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
        "rows", "split-frontier.html", "split-frontier.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
