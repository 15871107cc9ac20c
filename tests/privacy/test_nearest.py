"""The tiled search gives what a brute force in float64 gives, on tables made to fool float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.nearest import NearestRows, Tiling, _full_float32


def brute_force(query_ND, table_VD):
    table_VD = table_VD.double()
    found = [(query_D - table_VD).square().sum(1).argmin() for query_D in query_ND.double()]
    return torch.stack(found)  # argmin: the lowest index among equals


def plain_float32(query_ND, table_VD):
    table_VD = table_VD.float()
    return (table_VD.square().sum(1) - 2 * query_ND.float() @ table_VD.T).argmin(1)


def dot_product(query_ND, table_VD):
    return (query_ND.double() @ table_VD.double().T).argmax(1)


def hard_case(seed, rows, width, offset, scale):
    """Rows in families that differ by some last bits, equal rows, and queries near and far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    table_VD = normal(rows, width) * scale + offset
    family = torch.randint(max(1, rows // 4), (rows,), generator=generator)
    bits = 1 + normal(rows, width).sign() * 2.0**-22
    near = torch.rand(rows, generator=generator) < 0.5
    table_VD[near] = (table_VD[family] * bits)[near]
    equal = torch.rand(rows, generator=generator) < 0.3
    table_VD[equal] = table_VD[family][equal]
    picks = torch.randint(rows, (12,), generator=generator)
    length = torch.tensor([0.0, 1e-6, 0.5, 30.0, 1e6, 1e13]).repeat(2)[:, None]
    return table_VD, table_VD[picks].double() + length * normal(12, width).double()


cases = {
    "seed": st.integers(0, 10**6),
    "rows": st.integers(1, 60),
    "width": st.sampled_from([1, 2, 7, 64]),
    "offset": st.sampled_from([0.0, 1.0, 1000.0]),
    "scale": st.sampled_from([1e-4, 1.0, 100.0]),
}


@given(**cases, queries=st.integers(1, 13), tile=st.integers(1, 70))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_equals_brute_force_in_float64(seed, rows, width, offset, scale, queries, tile):
    table_VD, query_ND = hard_case(seed, rows, width, offset, scale)
    found = NearestRows(table_VD, Tiling(queries=queries, rows=tile)).find(query_ND)
    assert torch.equal(found, brute_force(query_ND, table_VD))


@pytest.mark.parametrize("wrong", [plain_float32, dot_product])
def test_wrong_searches_fail_on_these_cases(wrong):
    failures = 0
    for seed in range(20):
        table_VD, query_ND = hard_case(seed, 60, 64, 1.0, 1.0)
        failures += not torch.equal(wrong(query_ND, table_VD), brute_force(query_ND, table_VD))
    assert failures == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_table(dtype):
    table_VD, query_ND = hard_case(1, 50, 16, 0.0, 1.0)
    table_VD = table_VD.to(dtype)
    assert torch.equal(NearestRows(table_VD).find(query_ND), brute_force(query_ND, table_VD))


def test_wide_tables_and_default_tiles():
    generator = torch.Generator().manual_seed(0)
    table_VD = torch.randn(5000, 768, generator=generator) * 0.03
    table_VD[4999] = table_VD[17]
    noise = torch.randn(64, 768, generator=generator) * 0.3
    query_ND = torch.cat((table_VD[[17, 4999, 4998]], table_VD[:64] + noise))
    found = NearestRows(table_VD).find(query_ND)
    assert found[:3].tolist() == [17, 17, 4998]
    assert torch.equal(found, brute_force(query_ND, table_VD))


def test_all_rows_equal_gives_the_first():
    table_VD = torch.ones(500, 3)
    found = NearestRows(table_VD, Tiling(rows=64)).find(torch.randn(9, 3))
    assert found.tolist() == [0] * 9


def test_low_precision_matmuls_are_switched_off_and_back():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium")
        with _full_float32():
            assert matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_no_queries():
    assert NearestRows(torch.randn(4, 3)).find(torch.zeros(0, 3)).shape == (0,)


def test_bad_inputs_are_refused():
    for table in (torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(DataError, match="table of floats"):
            NearestRows(table)
    with pytest.raises(DataError, match="finite rows"):
        NearestRows(torch.tensor([[1.0], [math.nan]]))
    rows = NearestRows(torch.randn(4, 3))
    with pytest.raises(DataError, match=r"queries \[N, 3\]"):
        rows.find(torch.zeros(2, 4))
    for bad in (math.nan, math.inf, 1e20):
        with pytest.raises(DataError, match="finite queries"):
            rows.find(torch.full((1, 3), bad))
    with pytest.raises(ConfigError, match="at least 1"):
        Tiling(rows=0)
