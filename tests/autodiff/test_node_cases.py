"""Every node case of the ONNX backend test that has a derivative; see `node_cases`."""

from collections import Counter

import pytest

from tests.autodiff import node_cases
from tests.autodiff.node_cases import Case, Outcome

AT_LEAST = 930


@pytest.fixture(scope="module")
def results():
    return [node_cases.check(case) for case in node_cases.collect()]


def test_none_is_wrong(results):
    assert [f"{r.name}: {r.detail}" for r in results if r.outcome == Outcome.WRONG] == []


def test_many_pass(results):
    counts = Counter(result.outcome for result in results)
    assert counts[Outcome.PASSED] >= AT_LEAST, dict(counts)


def test_a_wrong_rule_would_be_found(monkeypatch):
    """The comparison itself can fail."""
    from onnx_kfe.autodiff import _registry

    cases: dict[str, Case] = {case.name: case for case in node_cases.collect()}
    assert node_cases.check(cases["test_tanh"]).outcome == Outcome.PASSED
    monkeypatch.setitem(_registry.RULES, "Tanh", _registry.RULES["Sigmoid"])
    assert node_cases.check(cases["test_tanh"]).outcome == Outcome.WRONG
