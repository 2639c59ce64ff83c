"""`docs/operators.md` lists what the registries have; `tools/vjp_coverage.py` writes it."""

import inspect
from pathlib import Path

import onnx
import pytest

from onnx_kfe.autodiff._functions import has_body
from onnx_kfe.autodiff._registry import RULES, ZERO_GRADIENT
from onnx_kfe.graph.fusions import FUSIONS

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"


def table(section: int) -> dict[str, str]:
    """The first two columns of the table of a section."""
    lines = PAGE.read_text().split("\n## ")[section].splitlines()
    rows = [line.strip("| \n").split(" | ") for line in lines if line.startswith("| ")]
    return {operator: cell.strip() for operator, cell, *_ in rows[1:]}


@pytest.fixture(scope="module")
def gradients():
    return table(0)


def test_the_page_names_the_module_of_every_rule(gradients):
    listed = {operator: gradient.strip("`") for operator, gradient in gradients.items() if gradient.startswith("`_")}
    rules = {operator: rule.apply.__module__.rpartition(".")[2] for operator, rule in RULES.items()}
    assert listed == rules, "write the page again: python tools/vjp_coverage.py --markdown > docs/operators.md"


def test_operators_without_a_derivative(gradients):
    listed = {operator for operator, gradient in gradients.items() if gradient == "no derivative"}
    assert listed >= set(ZERO_GRADIENT) - set(RULES)


def test_definitions(gradients):
    listed = {operator for operator, gradient in gradients.items() if gradient == "its definition"}
    assert "Attention" in listed
    opset = onnx.defs.onnx_opset_version()
    assert [operator for operator in listed if not has_body(operator, opset)] == []


def test_fused_operators():
    assert table(1) == {operator: inspect.getdoc(stands_for) for operator, stands_for in FUSIONS.items()}
