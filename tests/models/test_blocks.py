import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.models.blocks import Harmonizer, LowRankLinear, join_parts, split_parts
from blindtune.models.decoder import Decoder
from tiny_models import FAMILY_NAMES, VOCAB, tiny_model


def test_a_new_harmonizer_is_the_identity_with_a_gradient():
    torch.manual_seed(0)
    harmonizer = Harmonizer(16, 4)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(harmonizer(x), x, rtol=0, atol=0)
    harmonizer(x).square().sum().backward()
    assert harmonizer.up.weight.grad.abs().max() > 0


def test_a_harmonizer_computes_its_formula():
    torch.manual_seed(0)
    harmonizer = Harmonizer(16, 4, eps=1e-3)
    for parameter in harmonizer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 16)
    h = harmonizer
    for b in range(2):
        for t in range(3):
            v = x[b, t]
            n = v / torch.sqrt((v * v).mean() + 1e-3)
            y = v + h.up.weight @ torch.relu(h.down.weight @ n + h.down.bias) + h.up.bias
            torch.testing.assert_close(harmonizer(x)[b, t], y, atol=1e-5, rtol=1e-5)


def test_a_harmonizer_of_rank_zero_is_not_built():
    with pytest.raises(AssertionError, match="rank"):
        Harmonizer(16, 0)


def test_a_half_precision_harmonizer_keeps_its_type():
    harmonizer = Harmonizer(16, 4).bfloat16()
    large = torch.full((1, 2, 16), 3e20, dtype=torch.bfloat16)
    assert harmonizer(large).dtype == torch.bfloat16
    assert harmonizer(large * 0 + 300).isfinite().all()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_harmonizer_takes_and_returns_what_the_family_layers_do(name):
    decoder = Decoder(tiny_model(name))
    inputs = decoder.begin(torch.randint(3, VOCAB, (2, 6)))
    call = inputs.calls[1]
    harmonizer = Harmonizer(decoder.hidden_size, 2, returns_tuple=decoder.family.returns_tuple)
    real = decoder.layers[1](inputs.hidden_BLD, *call.args, **call.kwargs)
    fake = harmonizer(inputs.hidden_BLD, *call.args, **call.kwargs)
    assert type(real) is type(fake)
    if isinstance(real, tuple):
        assert len(real) == len(fake)
        real, fake = real[0], fake[0]
    assert real.shape == fake.shape


@settings(max_examples=40, deadline=None)
@given(
    heads=st.one_of(st.none(), st.integers(1, 4)),
    head_size=st.integers(1, 5),
    count=st.integers(1, 3),
    rank=st.integers(1, 3),
    bias=st.booleans(),
)
def test_low_rank_forward_equals_its_dense_weight(heads, head_size, count, rank, bias):
    size = (heads or 1) * head_size
    inside = 7
    parts = [(size, min(rank, size))] * count
    module = LowRankLinear(inside, parts, bias=bias, heads=heads)
    if bias:
        torch.nn.init.normal_(module.bias)
    x = torch.randn(2, 3, inside)
    dense = torch.nn.functional.linear(x, module.dense_weight(), module.bias)
    torch.testing.assert_close(module(x), dense, atol=1e-5, rtol=1e-5)
    assert module(x).shape == (2, 3, module.out_features)
    assert module.dense_weight().shape == (module.out_features, inside)


@settings(max_examples=40, deadline=None)
@given(heads=st.integers(1, 4), head_size=st.integers(1, 5), count=st.integers(1, 3))
def test_interleaved_rows_alternate_head_by_head(heads, head_size, count):
    """Oracle: the view that GPT-NeoX and BLOOM take of their fused output."""
    fused = torch.arange(heads * count * head_size).float().expand(2, -1)
    view = fused.view(2, heads, count, head_size)
    parts = split_parts(fused, [heads * head_size] * count, heads)
    for p, part in enumerate(parts):
        assert torch.equal(part.view(2, heads, head_size), view[:, :, p])
    assert torch.equal(join_parts(parts, heads), fused)


def test_parts_of_different_size_are_stacked():
    module = LowRankLinear(6, [(8, 3), (4, 2)], bias=False)
    assert module.ranks == (3, 2)
    up, down = torch.randn(4, 2), torch.randn(2, 6)
    module.set_factors(1, up, down)
    torch.testing.assert_close(module.dense_weight()[8:], up @ down)


def test_the_product_is_never_formed_in_forward():
    module = LowRankLinear(512, [(512, 4)], bias=False)
    x = torch.randn(1, 512)
    with torch.profiler.profile(profile_memory=True) as profile:
        module(x)
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.key_averages())
    assert largest < 512 * 512
