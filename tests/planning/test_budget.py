from __future__ import annotations

import math

import pytest

from onnx_kfe.errors import UsageError
from onnx_kfe.planning import Cost, Latency, Macs, Milliseconds, Params
from onnx_kfe.planning._budget import describe

COST = Cost(macs=700, parameters=30, nanoseconds=9)


def test_each_budget_reads_its_resource():
    assert Macs(0.5).of(COST) == 700
    assert Params(0.5).of(COST) == 30
    assert Latency(0.5).of(COST) == Milliseconds(0.5).of(COST) == 9


@pytest.mark.parametrize(
    ("amount", "original", "limit"),
    [(0.5, 1001, 500), (1, 1001, 1001), (1.0, 1001, 1001), (2, 1001, 2), (800, 1001, 800), (5e6, 10**7, 5000000)],
)
def test_fractions_and_numbers(amount, original, limit):
    assert Macs(amount).limit(original) == limit


def test_fractions_that_floats_cannot_hold_lose_nothing():
    assert int(0.29 * 100) == 28
    assert Macs(0.29).limit(100) == 29
    assert all(Macs(k / 1000).limit(1000) == k for k in range(1, 1001))


@pytest.mark.parametrize("amount", [0, -0.5, math.nan, math.inf])
@pytest.mark.parametrize("kind", [Macs, Params])
def test_amounts_that_cannot_be(kind, amount):
    with pytest.raises(UsageError, match=f"{kind.option} .*give a fraction of the original"):
        kind(amount)


def test_budgets_read_as_typed():
    assert describe([Macs(0.6), Params(0.25)]) == "--macs 0.6 --params 0.25"
    assert describe([Macs(41234567)]) == "--macs 41234567"
    assert describe([]) == ""


@pytest.mark.parametrize(("least", "original"), [(333, 1000), (1, 3), (290, 1000), (123457, 999983), (1000, 1000)])
def test_the_budget_that_can_be_met_is_met(least, original):
    fraction = Params(0.001).meeting(least, original)
    assert fraction.limit(original) >= least
    assert fraction.amount - least / original < 1.001e-3
    assert Params(5).meeting(least, original).limit(original) in (least, original)


@pytest.mark.parametrize("amount", [0, -0.5, 1.5, 2, math.nan, math.inf])
def test_latencies_that_cannot_be(amount):
    with pytest.raises(
        UsageError, match=f"^--latency {amount:g}: give a fraction of the original, or use --latency-ms$"
    ):
        Latency(amount)


@pytest.mark.parametrize("amount", [0, -0.5, math.nan, math.inf])
def test_milliseconds_that_cannot_be(amount):
    with pytest.raises(UsageError, match=f"^--latency-ms {amount:g}: give milliseconds above 0$"):
        Milliseconds(amount)


def test_milliseconds_are_never_a_fraction():
    assert [Milliseconds(amount).limit(10**9) for amount in (0.5, 1, 1.25, 3)] == [500000, 10**6, 1250000, 3 * 10**6]
    assert [Latency(amount).limit(10**7) for amount in (0.5, 1, 0.29)] == [5 * 10**6, 10**7, 2900000]
    assert describe([Latency(0.8), Milliseconds(1), Milliseconds(1.25), Macs(0.5)]) == (
        "--latency 0.8 --latency-ms 1 --latency-ms 1.25 --macs 0.5"
    )


@pytest.mark.parametrize(("least", "original"), [(333_333, 10**6), (1_234_567, 999_983), (1, 3), (5_000_000, 10**7)])
def test_the_milliseconds_that_can_be_met_are_met(least, original):
    possible = Milliseconds(0.001).meeting(least, original)
    assert least <= possible.limit(original) < least + 1000


def test_only_latency_asks_for_a_margin():
    assert Macs(0.5).margin == Params(0.5).margin == 0
    assert 0 < Latency(0.5).margin == Milliseconds(0.5).margin < 0.1


def test_a_latency_that_nothing_undercuts_is_the_whole_original():
    assert Latency(0.5).meeting(1_100_000, 1_000_000) == Latency(1.0)
    assert Latency(0.5).meeting(600_500, 1_000_000) == Latency(0.601)
