"""A split run computes what the unsplit model computes, on every family."""

import copy

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.exchange.wire.messages import pack, unpack
from blindtune.models.decoder import Decoder
from blindtune.split.partition import (
    Cut,
    PooledHead,
    default_pooling,
    feature_size,
    finish,
    lm_logits,
    mean_token_loss,
    run_bottom,
    run_top,
    run_vendor,
    stack_of,
    task_loss,
)
from tiny_encoders import ENCODER_NAMES, tiny_encoder
from tiny_models import FAMILY_NAMES, LAYERS, tiny_model

LENGTHS = (7, 3, 12)
LABELS = torch.tensor([0, 2, 1])


def build(name):
    return tiny_encoder(name) if name in ENCODER_NAMES else tiny_model(name)


def text(pad):
    ids = torch.randint(4, 128, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids.masked_fill(mask == 0, pad or 0), mask


def whole_features(stack, ids, mask):
    """The unsplit model's own forward, without any code of the split."""
    if isinstance(stack, Decoder):
        backbone = stack.model.get_submodule(stack.family.layers.rpartition(".")[0])
        return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return stack.model(input_ids=ids, attention_mask=mask).last_hidden_state


def cross(hidden, mask):
    """What the wire does: rows of real tokens, and padding made anew by the receiver."""
    packed, lengths = pack(hidden, mask)
    arrived = packed.detach().clone().requires_grad_()
    return packed, arrived, *unpack(arrived, lengths)


def split_features(customer, vendor, cut, ids, mask):
    """Features by three detached parts; returns them and what brings gradients back."""
    inputs = customer.begin(ids, mask)
    sent, arrived, hidden, seen_mask = cross(run_bottom(customer, cut, inputs), mask)
    assert torch.equal(seen_mask, mask)
    out = run_vendor(vendor, cut, hidden, seen_mask)
    if cut.partition == "two-part":
        return out, lambda: sent.backward(arrived.grad)
    out_sent, out_arrived, trunk, _ = cross(out, mask)

    def back():
        out_sent.backward(out_arrived.grad)
        sent.backward(arrived.grad)

    return run_top(customer, cut, trunk, inputs.calls), back


def gradients(*models):
    total = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad
    return total


def cuts(layers):
    return [
        Cut(layers=layers, cut=0),
        Cut(layers=layers, cut=layers - 1),
        Cut(partition="u-shape", layers=layers, cut=0, last=0),
        Cut(partition="u-shape", layers=layers, cut=1, last=1),
    ]


def check(name, loss_of):
    whole = build(name)
    stack = stack_of(whole)
    ids, mask = text(whole.config.pad_token_id)
    expected = loss_of(stack, whole_features(stack, ids, mask), ids, mask)
    expected.backward()
    truth = gradients(whole)
    for cut in cuts(stack.layer_count):
        customer, vendor = build(name), build(name)
        features, back = split_features(stack_of(customer), stack_of(vendor), cut, ids, mask)
        holder = vendor if cut.partition == "two-part" else customer
        loss = loss_of(stack_of(holder), features, ids, mask)
        loss.backward(retain_graph=True)  # MPNet: bottom and top share the position bias
        back()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        found = gradients(customer, vendor)
        assert found.keys() == truth.keys(), (cut, found.keys() ^ truth.keys())
        for key, gradient in truth.items():
            scale = float(gradient.abs().max()) + 1e-3
            torch.testing.assert_close(
                found[key] / scale, gradient / scale, rtol=1e-3, atol=2e-5, msg=f"{cut} {key}"
            )


@pytest.mark.parametrize("name", [*FAMILY_NAMES, *ENCODER_NAMES])
def test_split_classification_is_the_unsplit_one(name):
    torch.manual_seed(0)
    stack = stack_of(build(name))
    head = PooledHead(feature_size(stack), 3, default_pooling(stack)).requires_grad_(False)
    check(name, lambda _, f, ids, mask: task_loss(head(f, mask), LABELS, "classification"))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_split_language_modelling_is_the_unsplit_one(name):
    model = build(name)
    ids, mask = text(0)
    with torch.no_grad():
        features = whole_features(Decoder(model), ids, mask)
        ours = lm_logits(Decoder(model), features)
        assert torch.equal(ours, model(input_ids=ids, attention_mask=mask).logits)
    if name in ("smollm2", "gemma2", "opt-350m", "bloom"):
        check(name, lambda s, f, ids, mask: mean_token_loss(lm_logits(s, f), ids, mask))


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_pooling_does_not_see_padding(pooling):
    head = PooledHead(4, 2, pooling)
    features, (_, mask) = torch.randn(3, 12, 4), text(0)
    noisy = torch.where(mask[..., None] == 0, torch.randn(3, 12, 4), features)
    assert torch.equal(head(features, mask), head(noisy, mask))
    one_by_one = [
        head(f[None, :n], mask[:1, :n] * 0 + 1) for f, n in zip(features, LENGTHS, strict=True)
    ]
    torch.testing.assert_close(head(features, mask), torch.cat(one_by_one))


def test_regression_loss():
    outputs = torch.tensor([[1.0], [2.0]])
    assert task_loss(outputs, torch.tensor([0.0, 4.0]), "regression") == 2.5


def test_finish_follows_a_missing_norm():
    stack = stack_of(tiny_model("opt-350m"))
    assert finish(stack, torch.randn(1, 2, 32)).shape == (1, 2, feature_size(stack))
    assert feature_size(stack) == 16


@pytest.mark.parametrize(
    "wrong",
    [
        {"cut": LAYERS}, {"cut": -1}, {"cut": 1, "last": 1}, {"cut": 0, "partition": "three"},
        {"cut": 4, "last": 4, "partition": "u-shape"},
        {"cut": 4, "last": -1, "partition": "u-shape"},
    ],
)  # fmt: skip
def test_cuts_that_leave_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        Cut(layers=LAYERS, **wrong)


def test_who_holds_what():
    cut = Cut(partition="u-shape", layers=8, cut=2, last=1)
    assert cut.vendor_layers == range(2, 7)
    assert cut.customer_layers == (0, 1, 7)
    assert copy.copy(cut) == cut
