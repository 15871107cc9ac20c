"""What the noise's density says of words whose noisy embedding left through a layer norm."""

import math
from dataclasses import replace

import pytest
import torch
from attacked import observe, open_tiny_bottom, share_right

from blindtune.attacks import likelihoods
from blindtune.attacks.adversary import Spared, unigram
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.attacks.fitting import FitConfig
from blindtune.attacks.imitation import Imitation
from blindtune.attacks.likelihoods import vector_candidates
from blindtune.attacks.normed_embeddings import (
    NODES,
    NormedEmbedding,
    integrated,
    log_density,
    normed_embedding,
)
from blindtune.attacks.trained_inversion import InverterConfig, trained_inversion
from blindtune.models.margins import Margins
from blindtune.privacy.entropy import seeded_uniforms
from blindtune.privacy.metric_dp import Mechanism, d_chi_noise
from blindtune.split.partition import stack_of
from tiny_encoders import ENCODER_NAMES, tiny_encoder


def test_the_density_is_what_drawn_noise_says():
    draw, width, eta, count = torch.Generator().manual_seed(0), 4, 2.0, 2_000_000
    word_VD = 0.6 * torch.randn(5, width, generator=draw)
    gain_D, bias_D = torch.rand(width, generator=draw) + 0.5, torch.randn(width, generator=draw)
    place_1D = 0.6 * torch.randn(1, width, generator=draw)
    with pytest.warns(UserWarning, match="repeat"):
        noise_ND = d_chi_noise(count, width, eta, seeded_uniforms(1))
    # Of each word the share of draws whose state lies near to a state, by the angle.
    state_TD = torch.nn.functional.layer_norm(word_VD + place_1D, (width,)) * gain_D + bias_D
    seen_TD = torch.nn.functional.normalize((state_TD - bias_D) / gain_D, dim=1).double()
    share_TV = torch.empty(5, 5)
    for word, vector_D in enumerate((word_VD + place_1D).double()):
        sent_ND = torch.nn.functional.layer_norm(vector_D + noise_ND, (width,))
        sent_ND = torch.nn.functional.normalize(sent_ND, dim=1)
        share_TV[:, word] = (sent_ND @ seen_TD.T > 0.99).double().mean(0).float()
    assert share_TV.min() * count > 1000
    normed = NormedEmbedding(
        word_VD=word_VD - word_VD.mean(1, keepdim=True), place_LD=place_1D - place_1D.mean(),
        gain_D=gain_D, bias_D=bias_D,
    )  # fmt: skip
    along_TV, squared_TV = normed.measured(state_TD, torch.zeros(5, dtype=torch.int64))
    log_TV = log_density(along_TV, squared_TV, width, eta, torch.zeros(5))
    away_TV = log_TV - share_TV.log()
    away_TV = away_TV - away_TV.mean()  # one constant for all: states of equal sharpness
    assert log_TV.std() > 0.5
    assert away_TV.abs().max() < 0.12  # five deviations of the rarest count


@pytest.mark.parametrize("width", [3, 4, 32, 768])
@pytest.mark.parametrize("noise", [0.05, 0.5, 10.0, 1000.0])
def test_the_sum_is_the_integral(width, noise):
    """Against 120,001 nodes and the Bessel function itself, from no noise to nothing but noise."""
    draw, eta = torch.Generator().manual_seed(width), width / noise
    word_ND = torch.randn(24, width - 1, generator=draw, dtype=torch.float64) / width**0.5
    seen_ND = torch.randn(24, width - 1, generator=draw, dtype=torch.float64) / width**0.5
    seen_ND[:12] = word_ND[:12] + torch.linspace(0, 1, 12)[:, None] ** 2 / eta * seen_ND[:12]
    along_N = (word_ND * torch.nn.functional.normalize(seen_ND, dim=1)).sum(1)
    squared_N = (word_ND.square().sum(1) - along_N.square()).clamp_min(0)
    said_N = integrated(along_N, squared_N, width, eta, NODES) + math.log(NODES[1] - NODES[0])
    log_s_S = torch.linspace(-6, 3, 120_001, dtype=torch.float64) + math.log(
        float(along_N.abs().median()) + width / eta
    )
    true = []
    for along, squared in zip(along_N, squared_N, strict=True):
        radius_S = (squared + (log_s_S.exp() - along).square()).sqrt() * eta
        bessel_S = torch.special.scaled_modified_bessel_k1(radius_S) * radius_S
        value_S = (width - 1) * (log_s_S + math.log(eta)) + bessel_S.log() - radius_S
        true.append(value_S.nan_to_num(nan=-torch.inf).logsumexp(0))
    true_N = torch.stack(true) + math.log(float(log_s_S[1] - log_s_S[0]))
    assert (said_N - true_N).abs().max() < 0.04


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_every_encoder_is_known_as_it_is(name):
    stack = stack_of(tiny_encoder(name))
    normed = normed_embedding(stack, 6)
    words = torch.tensor([9, 40, 41, 5, 90, 17])
    made_LD = Imitation(stack, 0).states([words])[0]
    along_LV, squared_LV = normed.measured(made_LD, torch.arange(6))
    length_LV = (squared_LV + along_LV.square()).sqrt()
    assert torch.equal((along_LV / length_LV.clamp_min(1e-9)).argmax(1), words)
    right = torch.arange(6), words
    assert (squared_LV.sqrt()[right] < 2e-3 * length_LV[right]).all()
    torch.testing.assert_close(along_LV[right], length_LV[right], rtol=1e-4, atol=1e-4)


def test_encoders_that_do_otherwise_are_not_known():
    stack = stack_of(tiny_encoder("deberta", embedding_size=16))  # a projection before the norm
    assert normed_embedding(stack, 4) is None
    stack = stack_of(tiny_encoder("bert"))
    stack.model.embeddings.LayerNorm.weight.data[3] = 0.0
    assert normed_embedding(stack, 4) is None


def test_density_reads_more_than_a_trained_inverter_and_the_nearest(tmp_path):
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 128, (20,), generator=draw) for _ in range(180)]
    bottom = open_tiny_bottom(tmp_path)
    view, private = observe(bottom, Mechanism(eta=12.0, mode="vector"), texts=texts[:80])
    view = replace(view, public=tuple(texts[80:]))
    fit = FitConfig(epochs=12, learning_rate=3e-3)
    nearest, trained, density = (
        share_right(guess, private.ids)
        for guess in (
            nearest_tokens(view),
            trained_inversion(view, InverterConfig(kind="linear", fit=fit)),
            vector_candidates(view).first(),
        )
    )
    assert 0.2 < trained < density - 0.05
    assert nearest < density - 0.03


def test_it_reads_everything_where_noise_is_small_and_the_prior_where_it_is_all(tmp_path):
    bottom = open_tiny_bottom(tmp_path)
    view, private = observe(bottom, Mechanism(eta=1e3, mode="vector"), public=40)
    assert share_right(vector_candidates(view).first(), private.ids) == 1
    view, private = observe(bottom, Mechanism(eta=1e-2, mode="vector"), public=150)
    guess = vector_candidates(view).first()
    commonest = int(unigram(view.public, len(view.table_VD)).argmax())
    blind = share_right([torch.full_like(ids, commonest) for ids in private.ids], private.ids)
    assert share_right(guess, private.ids) < blind + 0.08
    bare = vector_candidates(replace(view, public=())).first()
    assert share_right(bare, private.ids) < 0.05


@pytest.mark.parametrize("factor", [0.0, 1e-5])
def test_it_reckons_with_words_that_are_spared(tmp_path, factor):
    view, private = observe(open_tiny_bottom(tmp_path), Mechanism(eta=0.1, mode="vector"), public=9)
    view = replace(view, states=tuple(Imitation(view.model, 0).states(private.ids)))  # no noise
    plain = share_right(vector_candidates(view).first(), private.ids)
    spared = replace(view, spared=Spared(share=0.9, factor=factor))
    assert share_right(vector_candidates(spared).first(), private.ids) > max(0.99, plain + 0.3)


@pytest.mark.parametrize("name", ["bert", "smollm2"])
def test_the_tokens_around_a_text_are_known_where_they_are(tmp_path, name):
    mechanism, around = Mechanism(eta=0.01, mode="vector"), Margins((3,), (4,))
    bottom = open_tiny_bottom(tmp_path, name)
    texts = [torch.tensor([3, 20, 21, 4]), torch.tensor([30, 31, 32])]  # a window has none
    view, _ = observe(bottom, mechanism, public=9)
    states = Imitation(bottom.stack, 0, mechanism, around).states(texts)
    found = vector_candidates(replace(view, states=tuple(states), margins=around))
    assert found.words[0][[0, -1], 0].tolist() == [3, 4]
    assert found.log_likelihoods[0][[0, -1], 1:].isinf().all()
    assert found.log_likelihoods[0][1:-1].isfinite().all()
    assert found.log_likelihoods[1].isfinite().all()


def test_portions_change_nothing(tmp_path, monkeypatch):
    view, _ = observe(open_tiny_bottom(tmp_path), Mechanism(eta=9.0, mode="vector"), public=9)
    whole = vector_candidates(view)
    monkeypatch.setattr(likelihoods, "PORTION_NUMBERS", 1)
    for one, other in zip(whole.words, vector_candidates(view).words, strict=True):
        assert torch.equal(one[:, 0], other[:, 0])
