"""What comes out of a mechanism for each word: computed or counted, and the two agree.

Shapes: V vocabulary, M draws, K words, U words that came out.
"""

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.privacy.channel import CountingConfig, counted_channel, log_channel
from blindtune.privacy.metric_dp import Mechanism, Privatizer

pytestmark = pytest.mark.filterwarnings("ignore::blindtune.privacy.entropy.SeededNoiseWarning")

TABLE_VD = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
WORDS = torch.tensor([3, 9, 27, 11])
SENT = torch.tensor([0, 3, 9, 28])


def test_exponential_mode_is_computed():
    found_UK = log_channel(Mechanism(eta=2.0, mode="exponential"), TABLE_VD, WORDS, SENT)
    distance_VV = torch.cdist(TABLE_VD.double(), TABLE_VD.double())
    right_VV = (-distance_VV).log_softmax(1)
    assert torch.allclose(found_UK.double(), right_VV[WORDS][:, SENT].T, atol=1e-5)


def test_token_mode_is_estimated_near_to_what_many_draws_give():
    mechanism = Mechanism(eta=3.0)
    machine = Privatizer(mechanism, TABLE_VD, testing_seed=1)
    drawn_MK = machine.tokens(WORDS.expand(20_000, -1))
    right_UK = torch.stack([(drawn_MK == y).double().mean(0) for y in SENT])
    config = CountingConfig(draws=2000)
    found_UK = log_channel(mechanism, TABLE_VD, WORDS, SENT, config, testing_seed=2).exp()
    assert right_UK.max() > 0.2
    assert (found_UK - right_UK).abs().max() < 0.06


def test_counts_are_smoothed_towards_near_words():
    drawn_MK = torch.tensor([[3, 9], [3, 3]])
    sent_U = torch.tensor([3, 5, 9])
    near_UK = torch.tensor([[1.0, 0.0], [0.5, 1.5], [0.0, 1.0]])
    config = CountingConfig(draws=2, smoothing=0.5)
    found_UK = counted_channel(drawn_MK, sent_U, near_UK, 12, config).exp()
    assert found_UK[0].argmax() == 0  # always what word 0 becomes
    assert found_UK[1, 1] == pytest.approx(3 * float(found_UK[1, 0]), rel=1e-4)  # never drawn
    assert found_UK[1].max() < found_UK[2, 1] < found_UK[0, 0]
    assert found_UK[2, 0] < 1e-9


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="sends no words"):
        log_channel(Mechanism(eta=1.0, mode="vector"), TABLE_VD, WORDS, SENT)
    with pytest.raises(ConfigError, match="positive smoothing"):
        CountingConfig(smoothing=0.0)
