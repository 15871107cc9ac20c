"""A vendor's tokenizer does not choose which of the customer's words get no noise."""

import json

import pytest
import torch
from split_world import LABELS, TEXTS
from tokenizers.processors import TemplateProcessing

from blindtune.errors import OutputError, PackageError
from blindtune.evaluation.audits.audit import AuditConfig
from blindtune.evaluation.audits.split import audit_split
from blindtune.evaluation.inspection import inspect
from blindtune.models.margins import Margins
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.token_importance import ImportanceConfig
from blindtune.privacy.word_groups import GroupingConfig, WordGroups
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.own_groups import make_groups
from blindtune.split.customer.privacy_statement import state_privacy
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.partition import Cut
from forged_tokenizers import around, forge_tokenizer
from tiny_models import tiny_model, tiny_tokenizer

WORD = "o"  # a letter is a word of the tiny tokenizer
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
SPECIAL = dict.fromkeys(NAMES, WORD)
STRONG = 1e-3


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    place = tmp_path_factory.mktemp("honest") / "bottom"
    write_bottom(tiny_model("smollm2"), tiny_tokenizer(), place, Cut(layers=8, cut=0))
    return place


def word_of(bottom, text=WORD):
    return bottom.tokenizer.convert_tokens_to_ids(text)


def drawn(bottom, mode, texts=TEXTS, eta=STRONG, **options):
    with pytest.warns(UserWarning, match="repeat"):
        return privatize(
            bottom, texts, mechanism=Mechanism(eta=eta, mode=mode), testing_seed=1, **options
        )


def kept(bottom, private):
    """Where states of cut 0 are what they would be without noise."""
    clean = privatize(bottom, private.ids, mechanism=None)
    pairs = zip(private.states, clean.states, strict=True)
    return torch.cat([(a == b).all(1) for a, b in pairs])


def share_of_word(bottom, private):
    """Share of the word's occurrences inside the texts that leave as they are."""
    inside = ~torch.cat([bottom.margins.mask(ids) for ids in private.ids])
    mine = inside & (torch.cat(private.ids) == word_of(bottom))
    assert mine.sum() > 10
    return kept(bottom, private)[mine].float().mean().item()


@pytest.mark.parametrize("mode", ["token", "exponential", "vector"])
@pytest.mark.parametrize("change", [lambda _: None, around([(WORD, 84)], [(WORD, 84)])],
                         ids=["by its settings", "and by what is around texts"])  # fmt: skip
def test_a_word_that_is_called_special_is_noised_as_any_other(honest, tmp_path, mode, change):
    bottom = open_bottom(forge_tokenizer(honest, tmp_path / "forged", change, **SPECIAL))
    assert word_of(bottom) == 84
    assert set(bottom.tokenizer.all_special_ids) == {84}
    assert share_of_word(bottom, drawn(bottom, mode)) < 0.2


def test_what_stands_around_a_text_is_kept_and_counts_for_nothing(honest, tmp_path):
    change = around([(WORD, 84), ("<s>", 1)], [(WORD, 84)])
    bottom = open_bottom(forge_tokenizer(honest, tmp_path / "forged", change))
    assert bottom.margins == Margins((84, 1), (84,))
    private = drawn(bottom, "token")
    at_ends = torch.cat([bottom.margins.mask(ids) for ids in private.ids])
    assert kept(bottom, private)[at_ends].all()
    same = kept(bottom, private)[~at_ends].float().mean().item()
    assert private.changed == pytest.approx(1 - same)
    loud = drawn(bottom, "token", importance=ImportanceConfig(fraction=0.0, special="noise"))
    assert kept(bottom, loud)[at_ends].float().mean() < 0.2


@pytest.mark.parametrize("text", ["<s>", "</s>", "<pad>", "<unk>", "\u2603"])
def test_special_tokens_that_a_text_spells_are_noised(honest, text):
    bottom = open_bottom(honest)
    private = drawn(bottom, "token", texts=[text] * 40)
    assert torch.isin(torch.cat(private.ids), torch.arange(4)).all()
    assert private.changed > 0.8


def test_contributing_tokens_are_counted_between_what_stands_around(honest, tmp_path):
    """Around every text of both classes stands a word that only one class says."""
    change = around([(WORD, 84)], [(WORD, 84)])
    bottom = open_bottom(forge_tokenizer(honest, tmp_path / "forged", change, **SPECIAL))
    texts = ["o", "a"] * 10
    labels = torch.tensor([1, 0] * 10)
    importance = ImportanceConfig(fraction=1 / 128, factor=0.0)
    private = drawn(bottom, "token", texts=texts, labels=labels, importance=importance, classes=2)
    assert private.changed == 0  # each class's only word is spared, and counted


@pytest.mark.parametrize("privatizer", ["token", "exponential", "vector"])
def test_the_statement_counts_every_word_and_says_what_is_around(honest, tmp_path, privatizer):
    plain = open_bottom(honest)
    change = around([("<s>", 1)], [("\x1b[2J", 84)])
    forged = open_bottom(forge_tokenizer(honest, tmp_path / "forged", change, **SPECIAL))
    config = PrivatizerConfig(privatizer=privatizer, eta=8.0)
    told = {}
    for bottom in (plain, forged):
        private = privatize(bottom, TEXTS, LABELS, mechanism=config.mechanism(8.0))
        told[bottom.id] = state_privacy(bottom, private, config, 8.0)
    before, after = told[plain.id], told[forged.id]
    tokens = [
        told.spending["epsilon_per_record_mean"] / told.spending["epsilon_per_token"]
        for told in (before, after)
    ]
    assert tokens == pytest.approx([sum(map(len, TEXTS)) / len(TEXTS)] * 2)
    assert before.spending["unprotected_tokens"] == after.spending["unprotected_tokens"] == 0
    assert after.expected_change == pytest.approx(before.expected_change, abs=0.12)
    assert "around every text: '<s>' before it; 'o' after it" in str(after)
    assert "around every text" not in str(before)


def test_groups_leave_no_word_alone_because_it_is_called_special(honest, tmp_path):
    (tmp_path / "public.txt").write_text("\n".join(TEXTS * 150))
    config = GroupingConfig(wrong_guesses=0.6, rare_size=2.0)
    forged = open_bottom(forge_tokenizer(honest, tmp_path / "forged", **SPECIAL))
    found = make_groups(forged, tmp_path / "public.txt", config)
    same = make_groups(open_bottom(honest), tmp_path / "public.txt", config)
    assert torch.equal(found.representative_V, same.representative_V)


def test_groups_count_no_words_in_cells_without_text(honest, tmp_path):
    bottom, config = open_bottom(honest), GroupingConfig(wrong_guesses=0.6, rare_size=2.0)
    rows = [{"text": text} for text in TEXTS * 150]
    for name, more in (("plain", []), ("gaps", [{"text": None}, {"label": 3}] * 5000)):
        lines = [json.dumps(row) for row in (*rows, *more)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    plain, gaps = (
        make_groups(bottom, tmp_path / f"{name}.jsonl", config) for name in ("plain", "gaps")
    )
    assert torch.equal(plain.representative_V, gaps.representative_V)


def test_groups_pass_by_what_stands_around_a_text(honest, tmp_path):
    change = around([("a", 70)], [(WORD, 85)])
    bottom = open_bottom(forge_tokenizer(honest, tmp_path / "forged", change))
    groups = WordGroups(torch.arange(128) // 2 * 2)
    for mechanism in (None, Mechanism(eta=1e5)):
        private = privatize(bottom, ["ooo"], mechanism=mechanism, groups=groups)
        sent = torch.cdist(private.states[0], bottom.stack.embedding.weight).argmin(1)
        assert sent.tolist() == [70, 84, 84, 84, 85]
        assert private.changed == 0


@pytest.mark.parametrize("texts", [0, 2, 3])
def test_a_tokenizer_that_does_not_send_a_text_once_is_refused(honest, tmp_path, texts):
    forged = forge_tokenizer(
        honest, tmp_path / "forged", around([("<s>", 1)], [("</s>", 2)], texts=texts)
    )
    for look in (open_bottom, inspect):
        with pytest.raises(PackageError, match=r"expected (it|each text) once"):
            look(forged)


def test_nor_is_it_written(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A $A")
    with pytest.raises(OutputError, match="each text once"):
        write_bottom(tiny_model("smollm2"), tokenizer, tmp_path / "b", Cut(layers=8, cut=0))


def test_inspecting_shows_what_is_around_and_what_is_called_special(honest, tmp_path):
    change = around([("<s>", 1)], [(WORD, 84)])
    found = inspect(forge_tokenizer(honest, tmp_path / "forged", change, cls_token="cancer"))
    assert (found.before, found.after) == (("'<s>'",), ("'o'",))
    assert "'cancer'" in found.special_tokens


def test_an_audit_asks_for_every_word(honest, tmp_path):
    forged = forge_tokenizer(honest, tmp_path / "forged", **SPECIAL)
    (tmp_path / "data.txt").write_text("\n".join(TEXTS))
    open_states = PrivatizerConfig(privatizer="none", unprotected=True)
    counted = []
    for place in (honest, forged):
        audit = audit_split(
            place, data=tmp_path / "data.txt", privatizer=open_states, config=AuditConfig()
        )
        found = audit.findings[audit.strongest]
        counted.append((found.value, found.low, found.high))
    assert counted[0] == counted[1]  # the interval is of as many tokens
    noised = audit_split(
        forged, data=tmp_path / "data.txt", config=AuditConfig(fresh_draws=1),
        privatizer=PrivatizerConfig(privatizer="token", eta=STRONG),
    )  # fmt: skip
    assert noised.findings[noised.strongest].value > 0.8
