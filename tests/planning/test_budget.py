from __future__ import annotations

import math

import pytest

from onnx_kfe.errors import UsageError
from onnx_kfe.planning import Cost, Macs, Params
from onnx_kfe.planning._budget import describe

COST = Cost(macs=700, parameters=30)


def test_each_budget_reads_its_resource():
    assert Macs(0.5).of(COST) == 700
    assert Params(0.5).of(COST) == 30


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
