"""Print how many node cases of the ONNX backend test confirm a gradient rule.

python tools/vjp_coverage.py [--json]
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.autodiff.node_cases import Outcome, Result, check, collect


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print every case as JSON")
    arguments = parser.parse_args()
    results = [check(case) for case in collect()]
    counts = Counter(result.outcome for result in results)
    if arguments.json:
        cases = [{"name": r.name, "operator": r.operator, "outcome": r.outcome, "detail": r.detail} for r in results]
        print(json.dumps({"counts": {outcome: counts[outcome] for outcome in Outcome}, "cases": cases}, indent=1))
    else:
        show(results)
    return int(counts[Outcome.WRONG] > 0)


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
