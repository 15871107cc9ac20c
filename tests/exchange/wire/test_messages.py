import msgspec
import pytest
import torch
from wire_vendor import batch, opening

from blindtune.errors import MismatchError, VerificationError
from blindtune.exchange.wire import messages
from blindtune.exchange.wire.messages import (
    KINDS,
    REPLIES,
    REQUESTS,
    WITH_TENSORS,
    Backward,
    Batch,
    BatchResult,
    ResumeJob,
    equal,
    pack,
    unpack,
)


def test_every_message_has_a_number_and_a_side():
    structs = {
        thing
        for thing in vars(messages).values()
        if isinstance(thing, type) and issubclass(thing, msgspec.Struct)
    } - {messages._Message, msgspec.Struct}
    assert structs == set(KINDS.values())
    assert set(KINDS) == REQUESTS | REPLIES
    assert not REQUESTS & REPLIES
    with_tensors = {
        number
        for number, kind in KINDS.items()
        if {"hidden_TD", "gradient_TD", "logits_BC", "labels"} & set(kind.__struct_fields__)
    }
    assert with_tensors == WITH_TENSORS


def test_the_numbers_on_the_wire_never_change():
    assert " ".join(KINDS[n].__name__ for n in sorted(KINDS)) == (
        "Hello Welcome OpenJob ResumeJob JobState Batch BatchResult Forward Outputs Backward "
        "Gradients Step Stepped Checkpoint Checkpointed Predict Predictions Status Cancel Busy "
        "Refusal"
    )


def test_no_message_prints_content_or_a_token():
    assert repr(batch(3)) == "<Batch 3>"
    for message in (opening(), ResumeJob(token="ab" * 32)):
        assert "abab" not in f"{message!r} {message}"


def test_pack_and_unpack_are_inverse_and_padding_does_not_leave():
    hidden_BLD = torch.arange(24.0).view(2, 4, 3)
    mask_BL = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    rows, lengths = pack(hidden_BLD, mask_BL)
    assert lengths == (2, 3)
    assert rows.shape == (5, 3)
    again, mask = unpack(rows, lengths)
    assert torch.equal(mask, mask_BL[:, :3])
    assert torch.equal(again, (hidden_BLD * mask_BL[..., None])[:, :3])


def test_left_padding_becomes_right_padding():
    rows, lengths = pack(torch.tensor([[[9.0], [1.0]]]), torch.tensor([[0, 1]]))
    assert unpack(rows, lengths)[0].tolist() == [[[1.0]]]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"lengths": (3, 1)}, MismatchError),
        ({"lengths": (3,)}, MismatchError),
        ({"labels": torch.tensor([0, 1, 1])}, MismatchError),
        ({"labels": torch.tensor([0.0, 1.0]).double()}, MismatchError),
        ({"hidden_TD": torch.zeros(3, 4, 1)}, VerificationError),
        ({"hidden_TD": torch.zeros(3, 4, dtype=torch.int64)}, VerificationError),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(changes, error):
    fields = {name: getattr(batch(1), name) for name in Batch.__struct_fields__}
    with pytest.raises(error):
        Batch(**{**fields, **changes})


def test_other_contradictions():
    with pytest.raises(VerificationError, match="earlier"):
        Backward(sequence=2, forward=2, gradient_TD=torch.zeros(1, 1))
    with pytest.raises(VerificationError, match="NaN"):
        BatchResult(sequence=2, loss=float("nan"), metrics={})


def test_equal_sees_every_bit():
    assert equal(batch(1), batch(1))
    assert not equal(batch(1), batch(1, seed=9))
    assert not equal(batch(1), ResumeJob(token="ab" * 32))
