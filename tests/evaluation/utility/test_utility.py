import math

import pytest
import torch

from blindtune.errors import DataError, ModelError
from blindtune.evaluation.utility import loss as utility
from blindtune.evaluation.utility.loss import loss_of_each, loss_on_targets, perplexity


def windows(rows=5, length=12, seed=1):
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def oracle_row(model, ids, labels):
    """Nats of the scored tokens of one example, token by token from the model's own logits."""
    with torch.no_grad():
        log_probs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return [-float(log_probs[t - 1, ids[t]]) for t in range(1, len(ids)) if labels[t] != -100]


def test_perplexity_matches_the_models_own_logits_in_every_family(any_model):
    ids = windows()
    nats = [oracle_row(any_model, row, row) for row in ids]
    result = perplexity(any_model, ids, batch_size=2)
    everything = [value for row in nats for value in row]
    assert result.tokens == len(everything) == 5 * 11
    assert result.nats_per_token == pytest.approx(sum(everything) / len(everything), rel=1e-5)
    means = torch.tensor([sum(row) / len(row) for row in nats], dtype=torch.float64)
    assert result.standard_error == pytest.approx(float(means.std()) / math.sqrt(5), rel=1e-4)


def test_uniform_model_has_the_vocabulary_as_perplexity(llama):
    torch.nn.init.zeros_(llama.get_output_embeddings().weight)
    result = perplexity(llama, windows())
    assert result.perplexity == pytest.approx(128, rel=1e-5)
    assert result.standard_error == pytest.approx(0, abs=1e-6)


def test_known_distribution(llama):
    """A head that ignores its input: token 7 has probability 1/2, the rest share the other."""
    head = torch.nn.Linear(32, 128)
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.fill_(math.log(0.5 / 127))
        head.bias[7] = math.log(0.5)
    llama.set_output_embeddings(head)
    ids = torch.tensor([[3, 7, 7, 9]])
    result = perplexity(llama, ids)
    expected = (2 * math.log(2) + math.log(254)) / 3
    assert result.nats_per_token == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.standard_error is None


def test_first_token_only_conditions(llama):
    ids = windows(rows=1)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 128
    assert perplexity(llama, ids).tokens == 11
    assert perplexity(llama, ids).nats_per_token != perplexity(llama, other).nats_per_token


def test_slices_and_batches_change_nothing(llama, monkeypatch):
    whole = perplexity(llama, windows())
    monkeypatch.setattr(utility, "LOGITS_AT_ONCE", 128 * 3)
    sizes = []
    llama.lm_head.register_forward_hook(lambda module, inputs, out: sizes.append(out.numel()))
    sliced = perplexity(llama, windows(), batch_size=3)
    assert sliced.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-6)
    assert max(sizes) <= 128 * 3
    assert len(sizes) > 10


def test_targets_of_examples_of_any_length(any_model):
    generator = torch.Generator().manual_seed(3)
    examples, nats = [], []
    for length in (9, 4, 13, 6, 2):
        ids = torch.randint(0, 128, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = -100
        examples.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "more": 1})
        nats += oracle_row(any_model, ids, labels)
    result = loss_on_targets(any_model, examples, batch_size=3)
    assert result.tokens == len(nats)
    assert result.nats_per_token == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    each_N, tokens_N = loss_of_each(any_model, examples, batch_size=2)
    assert tokens_N.tolist() == [5, 2, 7, 3, 1]  # as the data set has them, not by length
    for own, count in zip(each_N.tolist(), (5, 2, 7, 3, 1), strict=True):
        assert own == pytest.approx(sum(nats[:count]), rel=1e-5)
        nats = nats[count:]


def test_progress_and_mode(llama):
    seen = []
    llama.train()
    perplexity(llama, windows(), batch_size=2, on_progress=lambda *pair: seen.append(pair))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert llama.training


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (4,)])
def test_nothing_to_score_is_refused(llama, shape):
    with pytest.raises(DataError, match="at least two tokens"):
        perplexity(llama, torch.zeros(shape, dtype=torch.long))


def test_no_targets_is_refused(llama):
    with pytest.raises(DataError, match="found none in 1 examples"):
        loss_on_targets(llama, [{"input_ids": [1, 2, 3], "labels": [5, -100, -100]}])
    with pytest.raises(DataError, match="found none in 0 examples"):
        loss_on_targets(llama, [])


def test_nan_is_refused(llama):
    torch.nn.init.constant_(llama.model.norm.weight, float("nan"))
    with pytest.raises(ModelError, match="finite"):
        perplexity(llama, windows())
    with pytest.raises(ModelError, match="finite"):
        loss_of_each(llama, [{"input_ids": [1, 2, 3], "labels": [5, 6, 7]}])
