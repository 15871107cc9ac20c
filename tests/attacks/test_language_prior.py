"""What the mechanism says of each word, and what a language adds to it."""

import weakref
from dataclasses import replace

import pytest
import torch
from attacked import observe, open_tiny_bottom, sentences, share_right

from blindtune.attacks import language_prior
from blindtune.attacks.adversary import Candidates, Spared, unigram
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.attacks.fitting import FitConfig
from blindtune.attacks.imitation import Imitation
from blindtune.attacks.language_prior import (
    NO_WORD,
    CausalPrior,
    NgramPrior,
    best_weight,
    decode,
    right_by_weight,
)
from blindtune.attacks.likelihoods import ChannelConfig, token_candidates, vector_candidates
from blindtune.attacks.trained_inversion import InverterConfig, candidates, train_inverter
from blindtune.errors import ConfigError, DataError
from blindtune.models.decoder import Decoder
from blindtune.models.margins import Margins
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.customer.private_states import privatize
from tiny_models import tiny_model


def test_bayes_and_then_language_read_more_of_token_mode(tmp_path):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    view, private = observe(bottom, Mechanism(eta=9.0), public=150)
    sent = nearest_tokens(view)
    with pytest.warns(UserWarning, match="repeat"):
        found = token_candidates(view, sent, ChannelConfig(draws=64), testing_seed=5)
    prior = NgramPrior(view.public, len(view.table_VD))
    nearest, bayes, language = (
        share_right(guess, private.ids) for guess in (sent, found.first(), decode(found, prior))
    )
    assert 0.1 < nearest < bayes - 0.05
    assert bayes < language - 0.1


def test_bayes_knows_the_exponential_mechanism_exactly(tmp_path):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    view, private = observe(bottom, Mechanism(eta=5.0, mode="exponential"), public=150)
    sent = nearest_tokens(view)
    found = token_candidates(view, sent, ChannelConfig(words=10**6, candidates=5))
    table_VD = view.table_VD.double()
    channel_VV = (-2.5 * (table_VD[:, None] - table_VD[None]).norm(dim=2)).log_softmax(1)
    posterior_VV = channel_VV + unigram(view.public, len(table_VD))[:, None]
    best = posterior_VV[:, torch.cat(sent)].argmax(0)
    assert torch.equal(torch.cat(found.first()), best)
    assert 0.1 < share_right(sent, private.ids) < share_right(found.first(), private.ids) - 0.05


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_language_reads_more_of_vector_mode(tmp_path, name):
    eta = 6.0 if name == "smollm2" else 1.2
    bottom = open_tiny_bottom(tmp_path, name)
    view, private = observe(bottom, Mechanism(eta=eta, mode="vector"), public=150)
    found = vector_candidates(view, count=30)
    prior = NgramPrior(view.public, len(view.table_VD))
    nearest, language = (
        share_right(guess, private.ids) for guess in (nearest_tokens(view), decode(found, prior))
    )
    assert 0.1 < nearest < language - 0.2


def test_language_ranks_an_inverters_candidates_at_a_deep_cut(tmp_path):
    view, private = observe(
        open_tiny_bottom(tmp_path, cut=2), Mechanism(eta=6.0, mode="vector"), public=150
    )
    fit = FitConfig(epochs=4, learning_rate=3e-3)
    inverter, _ = train_inverter(view, InverterConfig(kind="linear", fit=fit))
    found = candidates(inverter, view.states, count=20)
    guess = decode(found, NgramPrior(view.public, len(view.table_VD)))
    assert share_right(guess, private.ids) > share_right(found.first(), private.ids) + 0.1


def test_pure_noise_leaves_the_language_alone(tmp_path):
    view, private = observe(
        open_tiny_bottom(tmp_path, "smollm2"), Mechanism(eta=1e-3, mode="vector"), public=100
    )
    prior = NgramPrior(view.public, len(view.table_VD))
    guess = decode(vector_candidates(view, count=40), prior)
    other = observe(open_tiny_bottom(tmp_path, "smollm2", cut=1), texts=sentences(12, seed=77))[
        1
    ].ids
    # What it says fits these texts no better than others of the language.
    length = min(len(text) for text in [*private.ids, *other])
    cut_off = [[text[:length] for text in texts] for texts in (guess, private.ids, other)]
    assert share_right(cut_off[0], cut_off[1]) < share_right(cut_off[0], cut_off[2]) + 0.15


def test_a_causal_model_is_a_prior_as_its_own_forward_says():
    model = tiny_model("smollm2")
    before = torch.tensor([[1, 40, 41], [1, 50, 51], [1, 40, 41]])
    words = torch.tensor([[7, 90], [7, 90], [8, 10**6]])  # the last is of a table's padding
    no_word = torch.tensor([[False, False], [False, False], [False, True]])
    said = CausalPrior(Decoder(model)).log_probabilities(before, words)
    with torch.no_grad():
        true = model(input_ids=before).logits[:, -1].log_softmax(1)
    true = true.gather(1, words.clamp(max=true.shape[1] - 1)).masked_fill(no_word, NO_WORD)
    torch.testing.assert_close(said, true, atol=1e-4, rtol=1e-4)
    with_begin = CausalPrior(Decoder(model), begin_id=1).log_probabilities(before[:, 1:], words)
    torch.testing.assert_close(with_begin, true, atol=1e-4, rtol=1e-4)
    nothing = CausalPrior(Decoder(model)).log_probabilities(before[:, :0], words)
    assert torch.equal(nothing, torch.zeros(3, 2).masked_fill(no_word, NO_WORD))


def test_rows_that_are_no_words_are_read_only_where_nothing_else_can_be():
    prior = CausalPrior(Decoder(tiny_model("smollm2")), begin_id=1)
    words = torch.tensor([[5, 6], [128, 7], [8, 9], [130, 151_935], [10, 11]])  # 128 words
    seen = torch.tensor([[0.0, -1.0], [0.0, -50.0], [0.0, -1.0], [-1.0, 0.0], [0.0, -1.0]])
    found = Candidates(words=(words,), log_likelihoods=(seen,))
    (text,) = decode(found, prior, beams=4)
    assert text[1] == 7
    assert text[3] == 151_935
    assert right_by_weight(found, [text], prior, weights=(0.0, 0.1))[0] < 5


@pytest.mark.parametrize("begin_id", [None, 1])
def test_of_a_beginning_beyond_what_a_model_reads_at_once_it_sees_the_end(begin_id):
    model = tiny_model("gpt2", n_positions=8)
    prior = CausalPrior(Decoder(model), begin_id)
    text = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    words = torch.arange(128)[None]
    before = text if begin_id is None else torch.cat([torch.tensor([[begin_id]]), text], 1)
    for length in range(1, 13):
        said = prior.log_probabilities(text[:, :length], words)
        seen = before[:, : length + (begin_id is not None)][:, -8:]
        with torch.no_grad():
            true = model(input_ids=seen).logits[:, -1].log_softmax(1)
        torch.testing.assert_close(said, true, atol=1e-4, rtol=1e-4)


def test_nothing_of_a_search_is_kept_and_weights_read_no_more_at_once_than_texts(monkeypatch):
    model, rows, caches = tiny_model("smollm2"), [], []
    forward = model.forward

    def watched(**given):
        rows.append(len(given["input_ids"]))
        caches.append(weakref.ref(given["past_key_values"]))
        return forward(**given)

    monkeypatch.setattr(model, "forward", watched)
    prior = CausalPrior(Decoder(model), begin_id=1)
    found = lattices(3, (6,) * 16)
    weights = (0.0, 0.01, 0.3, 1.0, 3.0, 10.0)
    right_by_weight(found, [torch.zeros(6)] * 16, prior, beams=8, weights=weights)
    assert 8 < max(rows) <= 8 * 8
    assert not any(cache() for cache in caches)


class Slow:
    """A prior that takes a second a word, by a clock of its own."""

    def __init__(self):
        self.now = 0.0
        self.forgot = 0

    def monotonic(self):
        return self.now

    def log_probabilities(self, before_BL, word_BK):
        self.now += 1.0
        return torch.zeros(word_BK.shape)

    def forget(self):
        self.forgot += 1


def test_no_word_is_added_when_time_is_up(monkeypatch):
    slow, found = Slow(), lattices(4, (6,) * 4)
    monkeypatch.setattr(language_prior, "time", slow)
    assert len(decode(found, slow, until=6.0)) == 4
    with pytest.raises(TimeoutError):
        decode(found, slow, until=9.5)
    assert slow.now == 10.0
    with pytest.raises(TimeoutError):
        right_by_weight(found, [torch.zeros(6)] * 4, slow, until=9.5)
    assert slow.now == 10.0
    assert slow.forgot == 3


def lattices(seed, lengths, shut=0.0):
    """Candidates of texts; a share of the tokens has but one that is possible."""
    draw = torch.Generator().manual_seed(seed)
    words = [
        torch.stack([torch.randperm(100, generator=draw)[:6] for _ in range(n)]) for n in lengths
    ]
    seen = [torch.randn(n, 6, generator=draw) for n in lengths]
    for rows in seen:
        rows[torch.rand(len(rows), generator=draw) < shut, 1:] = -torch.inf
    return Candidates(words=tuple(words), log_likelihoods=tuple(seen))


def slowly(model, begin_id, words_LK, seen_LK, beams, weight):
    """One text and one weight, all words before read anew for every token."""
    texts, scores = [[begin_id]], torch.zeros(1, dtype=torch.float64)
    for word_K, seen_K in zip(words_LK, seen_LK, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(texts)).logits[:, -1].double()
        grown = scores[:, None] + seen_K.double() + weight * logits.log_softmax(1)[:, word_K]
        order = [i for i in grown.flatten().argsort(descending=True).tolist()
                 if grown.flatten()[i] > -torch.inf][:beams]  # fmt: skip
        texts = [[*texts[i // len(word_K)], int(word_K[i % len(word_K)])] for i in order]
        scores = grown.flatten()[order]
    return torch.tensor(texts[0][1:])


@pytest.mark.parametrize("name", ["smollm2", "gpt2", "opt", "bloom", "gemma"])
def test_beams_that_share_keys_and_values_read_as_a_pass_for_each_would(name):
    model, weights = tiny_model(name), (0.0, 0.5, 1.0)
    found = lattices(0, (5, 1, 9, 7, 3, 6, 2, 8, 4, 5), shut=0.3)
    prior = CausalPrior(Decoder(model), begin_id=1)
    pairs = list(zip(found.words, found.log_likelihoods, strict=True))
    for weight in weights:
        guess = decode(found, prior, beams=3, weight=weight)
        for text, pair in zip(guess, pairs, strict=True):
            assert torch.equal(text, slowly(model, 1, *pair, 3, weight))
    known = decode(found, prior, beams=3, weight=0.5)
    right = right_by_weight(found, known, prior, beams=3, weights=weights)
    assert right[1] == sum(map(len, known)) > right[0]


def test_a_model_reads_each_word_once_and_nothing_that_is_certain(monkeypatch):
    model = tiny_model("smollm2")
    read = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **given: read.append(given["input_ids"].shape) or forward(**given)
    )
    prior = CausalPrior(Decoder(model), begin_id=1)
    decode(lattices(1, (6, 6), shut=1.0), prior)
    assert not read
    decode(lattices(1, (6, 6)), prior, beams=4)
    assert [length for _, length in read] == [1] * 6
    assert read[0][0] == 1  # the beginning of both
    read.clear()
    found = lattices(1, (6,))
    right_by_weight(found, [torch.zeros(6)], prior, beams=4, weights=(0.5, 0.5, 0.5))
    assert max(rows for rows, _ in read) <= 4  # what several weights go on from is read once


def test_of_words_that_are_equally_likely_the_first_is_taken():
    words = torch.arange(32).view(4, 8)
    found = Candidates(words=(words,), log_likelihoods=(torch.zeros(4, 8),))
    prior = NgramPrior([torch.arange(32)], 32)
    assert torch.equal(decode(found, prior, weight=0.0)[0], words[:, 0])
    assert torch.equal(found.first()[0], words[:, 0])


def test_beams_find_the_best_of_all_texts():
    draw = torch.Generator().manual_seed(0)
    words = torch.stack([torch.randperm(100, generator=draw)[:4] for _ in range(5)])
    seen = torch.randn(5, 4, generator=draw)
    prior = CausalPrior(Decoder(tiny_model("smollm2")))
    choices = torch.cartesian_prod(*[torch.arange(4)] * 5)
    texts = words.gather(1, choices.T).T
    scores = seen.gather(1, choices.T).sum(0).double()
    logits = Decoder(tiny_model("smollm2")).model(input_ids=texts).logits.detach().log_softmax(2)
    scores += logits[:, :-1].gather(2, texts[:, 1:, None])[..., 0].sum(1).double()
    found = decode(Candidates(words=(words,), log_likelihoods=(seen,)), prior, beams=4**4)[0]
    assert torch.equal(found, texts[scores.argmax()])
    alone = decode(Candidates(words=(words,), log_likelihoods=(seen,)), prior, weight=0.0)[0]
    assert torch.equal(alone, words.gather(1, seen.argmax(1, keepdim=True))[:, 0])


def test_ngrams_are_a_distribution():
    texts = [torch.tensor([1, 5, 6, 7]), torch.tensor([1, 5, 6, 8])]
    prior = NgramPrior(texts, 20)
    for before in ([], [1], [1, 5], [5, 6], [13, 14]):
        words = torch.arange(20)[None]
        said = prior.log_probabilities(torch.tensor([before], dtype=torch.int64), words)
        assert said.exp().sum() == pytest.approx(1.0, abs=1e-4)
    assert (
        int(prior.log_probabilities(torch.tensor([[1, 5]]), torch.arange(20)[None]).argmax()) == 6
    )
    assert unigram(texts, 20).exp().sum() == pytest.approx(1.0, abs=1e-4)


def test_bad_views(tmp_path):
    token, _ = observe(open_tiny_bottom(tmp_path, "smollm2"), Mechanism(eta=9.0), public=3)
    bert, _ = observe(open_tiny_bottom(tmp_path), Mechanism(eta=9.0, mode="vector"), public=3)
    with pytest.raises(ConfigError, match="token or exponential mode"):
        token_candidates(bert, nearest_tokens(bert))
    with pytest.raises(DataError, match="one sent token"):
        token_candidates(token, ())
    with pytest.raises(ConfigError, match="vector mode at cut 0"):
        vector_candidates(token)
    noisy = Mechanism(eta=9.0, mode="vector")
    opt, _ = observe(open_tiny_bottom(tmp_path, "opt"), noisy, public=3)
    with pytest.raises(ConfigError, match="does otherwise"):
        vector_candidates(opt)
    with pytest.raises(DataError, match="public text"):
        NgramPrior([], 10)
    with pytest.raises(ConfigError, match="at least 1"):
        ChannelConfig(draws=0)
    with pytest.raises(ConfigError, match="beams"):
        decode(Candidates(words=(), log_likelihoods=()), NgramPrior(token.public, 128), beams=0)


@pytest.mark.parametrize(("misleading", "weight"), [(True, 0.0), (False, 1.0)])
def test_a_rehearsal_says_how_far_to_trust_the_prior(misleading, weight):
    prior = NgramPrior([torch.tensor([5, 6, 7])] * 20, 20)
    words = torch.tensor([[5, 9], [6, 9], [7, 9]])
    # Slightly for 9, so that a prior decides; the prior says 5, 6, 7.
    found = Candidates(words=(words,), log_likelihoods=(torch.tensor([[0.0, 3.0]] * 3),))
    truth = torch.tensor([9, 9, 9]) if misleading else torch.tensor([5, 6, 7])
    assert best_weight(found, [truth], prior, weights=(0.0, 1.0)) == weight
    with pytest.raises(DataError, match="known text"):
        best_weight(found, [truth[:2]], prior)


def test_what_stands_around_a_text_is_known_and_no_guess_at_anything_else(tmp_path):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    view, _ = observe(bottom, Mechanism(eta=5.0, mode="exponential"), public=20)
    around = Margins((1,), (2,))
    framed = [torch.cat([torch.tensor([1]), text, torch.tensor([2])]) for text in view.public]
    view = replace(
        view, margins=around, public=tuple(framed),
        states=tuple(bottom.stack.embedding(text) for text in framed[:4]),
    )  # fmt: skip
    found = token_candidates(view, tuple(framed[:4]))
    for words_LK, likelihood_LK in zip(found.words, found.log_likelihoods, strict=True):
        assert (words_LK[0, 0], words_LK[-1, 0]) == (1, 2)
        assert likelihood_LK[[0, -1], 0].tolist() == [0, 0]
        assert likelihood_LK[[0, -1], 1:].isinf().all()
        assert not torch.isin(words_LK[1:-1, 0], torch.tensor([1, 2])).any()


@pytest.mark.parametrize("mode", ["token", "exponential"])
def test_bayes_knows_that_representatives_are_drawn_among_themselves(tmp_path, mode):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    groups = WordGroups(torch.arange(128) // 2 * 2)
    mechanism = Mechanism(eta={"token": 9.0, "exponential": 5.0}[mode], mode=mode)
    view, _ = observe(bottom, mechanism, public=150)
    private = privatize(bottom, sentences(60, seed=1), mechanism=mechanism, groups=groups)
    right = {}
    for known in (groups, None):
        seen = replace(view, states=private.states, groups=known)
        found = token_candidates(seen, nearest_tokens(seen))
        right[known] = share_right(found.first(), private.ids)
        if known is not None:
            words_TK = torch.cat(found.words)
            likelihood_TK = torch.cat(found.log_likelihoods)
            same_TK = groups.apply(words_TK) == groups.apply(words_TK[:, :1])
            spread_TK = (likelihood_TK - likelihood_TK[:, :1]).abs()
            assert (same_TK.sum(1) > 1).any()
            assert spread_TK[same_TK].max() == 0  # nothing tells words of a group apart
    assert right[groups] > right[None] + 0.02


@pytest.mark.parametrize("mode", ["token", "exponential"])
def test_bayes_reckons_with_words_that_are_spared(tmp_path, mode):
    mechanism = Mechanism(eta=0.01, mode=mode)  # hides nearly everything
    view, private = observe(open_tiny_bottom(tmp_path, "smollm2"), mechanism, public=40)
    draw = torch.Generator().manual_seed(0)
    sent = tuple(
        torch.where(
            torch.rand(ids.shape, generator=draw) < 0.5,
            ids,
            torch.randint(len(view.table_VD), ids.shape, generator=draw),
        )
        for ids in private.ids
    )
    read = []
    for spared in (None, Spared(share=0.5, factor=0.0), Spared(share=0.5, factor=1e-5)):
        found = token_candidates(replace(view, spared=spared), sent)
        read.append(share_right(found.first(), private.ids))
    assert read[1] > read[0] + 0.2
    assert read[2] == pytest.approx(read[1], abs=0.05)


def test_the_adversary_spares_as_many_tokens_in_its_own_texts(tmp_path):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    texts = [
        torch.randint(5, 90, (50,), generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    ]
    clean = torch.cat(Imitation(bottom.stack, 0).states(texts))
    noise = Mechanism(eta=1e-3, mode="vector")
    spared = Imitation(bottom.stack, 0, noise, spared=Spared(share=0.3, factor=0.0))
    same = (torch.cat(spared.states(texts)) - clean).abs().amax(1) < 1e-4
    assert 0.15 < same.double().mean() < 0.45


@pytest.mark.parametrize("factor", [0.0, 1e-5])
def test_the_noises_density_reckons_with_words_that_are_spared(tmp_path, factor):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    view, private = observe(bottom, Mechanism(eta=0.1, mode="vector"), public=40)
    view = replace(view, states=tuple(Imitation(bottom.stack, 0).states(private.ids)))  # no noise
    plain = share_right(vector_candidates(view).first(), private.ids)
    spared = replace(view, spared=Spared(share=0.9, factor=factor))
    assert share_right(vector_candidates(spared).first(), private.ids) > max(0.99, plain + 0.3)
