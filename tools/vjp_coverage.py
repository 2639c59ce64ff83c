"""Print how many node cases of the ONNX backend test confirm a gradient rule.

python tools/vjp_coverage.py [--json | --markdown > docs/operators.md]
"""

import argparse
import inspect
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnx_kfe.autodiff._functions import has_body
from onnx_kfe.autodiff._registry import RULES, ZERO_GRADIENT
from onnx_kfe.graph.fusions import FUSIONS
from tests.autodiff.node_cases import Outcome, Result, check, collect

PAGE = """\
# Operators with a gradient

A layer can be pruned if every operator between it and the outputs passes gradients on. Those of the ONNX domain are
below. A rule lies in the module of `onnx_kfe/autodiff/` that is named; an operator that ONNX defines by others needs
none, its definition is differentiated; *no derivative* are operators that no small change of an input changes, or
that neither take nor give floating-point numbers. Some rules ask for sizes that are known before the model runs; what
stands in the way of a layer is listed by `onnx-kfe collect`. The last column counts the cases of `onnx.backend.test`
whose gradients agree with central differences, of those that have a derivative there; {expanded} more pass that write
an operator in others.

This page is written by `python tools/vjp_coverage.py --markdown > docs/operators.md`.

| operator | gradient | node cases |
|---|---|---|
"""
FUSED = """
## Fused operators of ONNX Runtime

In a model that ONNX Runtime has optimised, these are written in the operators above before anything else is done, so
that the layers inside them are pruned and only operators of ONNX come out. In forms that are not decomposed (earlier
keys and values, queries and keys in one, transposed batches and others) they stay, and `onnx-kfe inspect` lists the
layers inside them with what is in the way. Models whose layout is that of one processor are refused: prune, then
optimise.

| operator | stands for |
|---|---|
"""
EXPANDED = "_expanded"
"""In the name of a case that writes an operator in others."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print every case as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the page on every operator of ONNX")
    arguments = parser.parse_args()
    results = [check(case) for case in collect()]
    counts = Counter(result.outcome for result in results)
    if arguments.json:
        cases = [{"name": r.name, "operator": r.operator, "outcome": r.outcome, "detail": r.detail} for r in results]
        print(json.dumps({"counts": {outcome: counts[outcome] for outcome in Outcome}, "cases": cases}, indent=1))
    elif arguments.markdown:
        print(page(results), end="")
    else:
        show(results)
    return int(counts[Outcome.WRONG] > 0)


def page(results: list[Result]) -> str:
    by_operator: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for result in results:
        if EXPANDED not in result.name:
            by_operator[result.operator][result.outcome] += 1
    opset = onnx.defs.onnx_opset_version()
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain and not schema.deprecated}
    rows = []
    for operator in sorted(known):
        counts = by_operator[operator]
        cases = sum(counts.values()) - counts[Outcome.NOT_APPLICABLE]
        confirmed = f"{counts[Outcome.PASSED]} of {cases}" if cases else ""
        rows.append(f"| {operator} | {gradient(operator, opset, counts[Outcome.PASSED])} | {confirmed} |")
    expanded = sum(result.outcome == Outcome.PASSED and EXPANDED in result.name for result in results)
    fused = [f"| {operator} | {inspect.getdoc(stands_for)} |" for operator, stands_for in sorted(FUSIONS.items())]
    return PAGE.format(expanded=expanded) + "\n".join(rows) + "\n" + FUSED + "\n".join(fused) + "\n"


def gradient(operator: str, opset: int, passed: int) -> str:
    """Where the gradient of an operator comes from, or why there is none."""
    if operator in RULES:
        return f"`{RULES[operator].apply.__module__.rpartition('.')[2]}`"
    if operator in ZERO_GRADIENT or not has_floats(operator):
        return "no derivative"
    # Only a case tells whether all that a definition uses has a gradient.
    return "its definition" if has_body(operator, opset) and passed else "none yet"


def has_floats(operator: str) -> bool:
    """Whether an operator may take and give floating-point numbers."""
    schema = onnx.defs.get_schema(operator)
    takes, gives = (
        any("tensor(float)" in kind for parameter in parameters for kind in parameter.types)
        for parameters in (schema.inputs, schema.outputs)
    )
    bodies = any(attribute.type.name.startswith("GRAPH") for attribute in schema.attributes.values())
    return (takes or bodies) and gives


def show(results: list[Result]) -> None:
    by_operator: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for result in results:
        by_operator[result.operator][result.outcome] += 1
    table = Table("operator", *Outcome, title="Node cases, by the first operator of each")
    for operator, counts in sorted(by_operator.items()):
        if set(counts) != {Outcome.NOT_APPLICABLE}:
            table.add_row(operator, *(str(counts[outcome] or "") for outcome in Outcome))
    totals = Counter(result.outcome for result in results)
    table.add_section()
    table.add_row("all", *(str(totals[outcome]) for outcome in Outcome))
    console = Console()
    console.print(table)
    for result in results:
        if result.outcome == Outcome.WRONG:
            console.print(f"wrong: {result.name}: {result.detail}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
