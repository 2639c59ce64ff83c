"""Allocation: one candidate for each layer, least loss under the budgets (a multiple-choice knapsack)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from onnx_kfe.errors import BudgetError, KfeError
from onnx_kfe.planning._budget import Budget
from onnx_kfe.planning._forms import FORMS, Cost, dense_cost
from onnx_kfe.planning._problem import LayerProblem

__all__ = ["DENSE", "Candidate", "allocate", "candidates"]

DENSE = "dense"
_RELATIVE_GAP = 1e-4
_SECONDS = 10.0


@dataclass(frozen=True)
class Candidate:
    """A form and ranks for a layer, with what they cost and lose.

    Attributes:
        form: Key of `FORMS`, or ``dense`` for the layer as it is.
        ranks: Its ranks.
        cost: MACs and parameters.
        loss: Predicted loss in nats per sample.
    """

    form: str
    ranks: tuple[int, ...]
    cost: Cost
    loss: float


def candidates(problem: LayerProblem, round_to: int) -> list[Candidate]:
    """The layer as it is, and every form and rank that is cheaper and that no other candidate beats in all respects."""
    dense = dense_cost(problem.geometry)
    found = [Candidate(DENSE, (), dense, 0.0)]
    for form in FORMS.values():
        if form.limits(problem.geometry):
            for ranks, loss in form.losses(problem, round_to):
                cost = form.cost(problem.geometry, ranks)
                if cost.saves(dense):
                    found.append(Candidate(form.name, ranks, cost, max(loss, 0.0)))
    return _undominated(found)


def _undominated(found: list[Candidate]) -> list[Candidate]:
    table = np.array([(c.cost.macs, c.cost.parameters, c.loss) for c in found])
    kept = []
    for row, candidate in zip(table, found, strict=True):
        better = (table <= row).all(axis=1) & (table < row).any(axis=1)
        if not better.any():
            kept.append(candidate)
    return kept


def allocate(
    options: Mapping[str, Sequence[Candidate]], budgets: Sequence[Budget], original: Cost
) -> dict[str, Candidate]:
    """Choose a candidate for each layer, minimising the summed predicted loss.

    Args:
        options: Candidates by layer.
        budgets: Bounds on the whole model.
        original: Cost of the whole model, its parts that no candidate covers included.

    Raises:
        BudgetError: No choice meets the budgets; the message says what can be met.
    """
    flat = [(name, candidate) for name, choices in options.items() for candidate in choices]
    if not flat:
        raise BudgetError("nothing in the model can be pruned; see onnx-kfe inspect for the reasons")
    places = {name: place for place, name in enumerate(options)}
    rows = [places[name] for name, _ in flat]
    one_each = csr_array((np.ones(len(flat)), (rows, range(len(flat)))), shape=(len(options), len(flat)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for budget in budgets:
        spent = np.array([budget.of(candidate.cost) for _, candidate in flat], float)
        dense = sum(max(budget.of(candidate.cost) for candidate in choices) for choices in options.values())
        room = budget.limit(budget.of(original)) - (budget.of(original) - dense)
        least = sum(min(budget.of(candidate.cost) for candidate in choices) for choices in options.values())
        if least > room:
            reachable = (budget.of(original) - dense + least) / budget.of(original)
            raise BudgetError(
                f"{budget.option} {budget.amount:g} cannot be met: "
                f"the smallest this model can become is {budget.option} {np.ceil(1000 * reachable) / 1000:g}"
            )
        scale = max(spent.max(), 1.0)
        constraints.append(LinearConstraint(spent[None] / scale, -np.inf, room / scale))
    losses = np.array([candidate.loss for _, candidate in flat])
    objective = losses / max(losses.max(), np.finfo(np.float64).tiny)
    result = milp(
        objective, constraints=constraints, integrality=np.ones(len(flat), np.int64), bounds=Bounds(0, 1),
        options={"mip_rel_gap": _RELATIVE_GAP, "time_limit": _SECONDS},
    )  # fmt: skip
    if result.x is None:
        raise (
            BudgetError("the budgets cannot be met together; relax one of them")
            if result.status == 2
            else KfeError(f"the allocation could not be solved: {result.message}")
        )
    return {name: candidate for (name, candidate), chosen in zip(flat, result.x, strict=True) if chosen > 0.5}
