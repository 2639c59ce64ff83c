"""Allocation: one candidate for each layer, least loss under the budgets (a multiple-choice knapsack)."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from onnx_kfe.errors import BudgetError, KfeError
from onnx_kfe.kfe import Array
from onnx_kfe.planning._budget import Budget, describe
from onnx_kfe.planning._chain import Cost, layer_cost
from onnx_kfe.planning._forms import FORMS
from onnx_kfe.planning._latency import LatencyModel
from onnx_kfe.planning._problem import LayerProblem
from onnx_kfe.planning._stopwatch import Refusal

__all__ = ["DENSE", "REMOVED", "Candidate", "allocate", "candidates", "hull", "least", "worthwhile"]

DENSE = "dense"
REMOVED = "removed"
_RELATIVE_GAP = 1e-4
_SECONDS = 10.0
_SAME_SCALE = 100.0  # the largest loss over the total, up to which the total is exact enough
_TOLERANCE = 1e-6  # of HiGHS, on a constraint
_INFEASIBLE = 2  # status of `milp`
_STDOUT = 1


@dataclass(frozen=True)
class Candidate:
    """A form and ranks for a layer, with what they cost and lose.

    Attributes:
        form: Key of `FORMS`, ``dense`` for the layer as it is, or ``removed`` where nothing is left of it.
        ranks: Its ranks.
        cost: MACs, parameters, and latency where that was measured; below 0 by those of layers that have no candidates
            and vanish with this one.
        loss: Predicted loss in nats per sample.
        removes: Names of the other layers that vanish with this one, whatever candidates they have.
    """

    form: str
    ranks: tuple[int, ...]
    cost: Cost
    loss: float
    removes: tuple[str, ...] = ()


def candidates(problem: LayerProblem, round_to: int, latency: LatencyModel | None = None) -> list[Candidate]:
    """The layer as it is, then every form and rank that saves something and that no other one beats in all respects.

    Args:
        problem: The layer.
        round_to: The grid of ranks.
        latency: Measured latencies; forms that the runtime refuses are left out.
    """
    layer, geometry = problem.layer, problem.geometry
    dense = layer_cost(layer)
    if latency is not None:
        dense = replace(dense, nanoseconds=latency.dense(layer))
    found = []
    for form in FORMS.values():
        if form.searched and form.limits(geometry):
            for ranks, loss in form.losses(problem, round_to):
                cost = layer_cost(layer, partial(form.cost, ranks=ranks))
                if latency is not None:
                    nanoseconds = latency.nanoseconds(layer, form.links(geometry, ranks))
                    if isinstance(nanoseconds, Refusal):
                        continue
                    cost = replace(cost, nanoseconds=nanoseconds)
                if cost.saves(dense) or cost.nanoseconds < dense.nanoseconds:
                    found.append(Candidate(form.name, ranks, cost, max(loss, 0.0)))
    return [Candidate(DENSE, (), dense, 0.0), *_undominated(found)]


def worthwhile(choices: Sequence[Candidate], budgets: Sequence[Budget]) -> list[Candidate]:
    """The layer as it is, and what saves enough of something that there is a budget of."""
    dense = next(choice for choice in choices if choice.form == DENSE)

    def saves(choice: Candidate) -> bool:
        return any(b.of(choice.cost) < (1 - b.margin) * b.of(dense.cost) for b in budgets)

    return [choice for choice in choices if choice is dense or saves(choice)]


def _undominated(found: list[Candidate]) -> list[Candidate]:
    """Those that no other equals or beats in every respect; one of those that are equal."""
    found = sorted(found, key=lambda c: (c.loss, *astuple(c.cost)))
    costs = np.array([astuple(c.cost) for c in found])
    kept: list[int] = []  # only what loses no more can beat a candidate, and that is kept or beaten itself
    for place, cost in enumerate(costs):
        if not (costs[kept] <= cost).all(axis=1).any():
            kept.append(place)
    return [found[place] for place in kept]


def allocate(
    options: Mapping[str, Sequence[Candidate]], budgets: Sequence[Budget], original: Cost, dense: Cost | None = None
) -> dict[str, Candidate]:
    """Choose a candidate for each layer, minimising the summed predicted loss.

    Args:
        options: Candidates by layer, the layer as it is among them. The sets of layers that vanish together are apart,
            or one lies within the other.
        budgets: Bounds on the whole model.
        original: Cost of the whole model, its parts that no candidate covers included.
        dense: The same with all layers as they are, where normalising made that cheaper.

    Returns:
        A candidate for each layer of `options`, ``removed`` at no loss for those that vanish with another.

    Raises:
        BudgetError: No choice meets the budgets; the message says what can be met.
        KfeError: The solver gave up.
    """
    if not options:
        raise BudgetError("nothing in the model can be pruned; see onnx-kfe inspect for the reasons")
    knapsack = _Knapsack(options, original, dense or original)
    for budget in budgets:
        if (least := knapsack.least(budget)) > budget.limit(budget.of(original)):
            possible = budget.meeting(least, budget.of(original))
            raise BudgetError(f"{budget} cannot be met: the smallest this model can become is {possible}")
    chosen = knapsack.least_loss(budgets)
    if chosen is None:
        *held, last = budgets
        smallest = knapsack.solve(knapsack.change(last), held)
        possible = last if smallest is None else last.meeting(knapsack.total(last, smallest), last.of(original))
        raise BudgetError(
            f"{describe(budgets)} cannot be met together: under {describe(held)} the smallest is {possible}"
        )
    taken = dict(itertools.compress(knapsack.flat, chosen))
    return {name: taken.get(name, Candidate(REMOVED, (), Cost(0, 0), 0.0)) for name in options}


def least(
    options: Mapping[str, Sequence[Candidate]],
    budget: Budget,
    original: Cost,
    dense: Cost,
    held: Sequence[Budget] = (),
) -> int:
    """The least of a budget's resource that the whole model can cost, with the arguments of `allocate`.

    Within the budgets held it is what the solver finds, up to its gap; those that cannot be held together do not count.
    """
    knapsack = _Knapsack(options, original, dense)
    chosen = knapsack.solve(knapsack.change(budget), held) if held else None
    return knapsack.least(budget) if chosen is None else knapsack.total(budget, chosen)


def hull(choices: Sequence[Candidate], kind: type[Budget]) -> list[Candidate]:
    """The candidates on the lower convex hull of a layer's loss against its cost, from the layer as it is down.

    Args:
        choices: Candidates of a layer, the layer as it is among them; removals are left out.
        kind: The budget that says which cost.
    """
    cost = kind(1).of
    own = [choice for choice in choices if choice.form != REMOVED]
    found = [next(choice for choice in own if choice.form == DENSE)]
    while cheaper := [choice for choice in own if cost(choice.cost) < cost(found[-1].cost)]:

        def slope(choice: Candidate, start: Candidate = found[-1]) -> tuple[float, int]:
            return (choice.loss - start.loss) / (cost(start.cost) - cost(choice.cost)), cost(choice.cost)

        found.append(min(cheaper, key=slope))
    return found


class _Knapsack:
    """The choice of one candidate a layer, its own or one that removes it, as a 0-1 programme, solved by HiGHS."""

    def __init__(self, options: Mapping[str, Sequence[Candidate]], original: Cost, dense: Cost) -> None:
        self.flat = [(name, candidate) for name, choices in options.items() for candidate in choices]
        self._original, self._dense = original, dense
        rows = {name: row for row, name in enumerate(options)}
        covered = [[name, *(other for other in choice.removes if other in rows)] for name, choice in self.flat]
        self._rows = [[rows[name] for name in names] for names in covered]  # that each candidate covers, its own first

    def change(self, budget: Budget) -> Array:
        """What each candidate adds to the cost of the model, 0 or less."""
        dense = [budget.of(candidate.cost) for _, candidate in self.flat if candidate.form == DENSE]
        replaced = [sum(dense[row] for row in rows) for rows in self._rows]
        return np.array([budget.of(candidate.cost) for _, candidate in self.flat], float) - replaced

    def total(self, budget: Budget, chosen: npt.NDArray[np.bool_]) -> int:
        """What the whole model costs with the chosen candidates."""
        return budget.of(self._dense) + int(self.change(budget)[chosen].sum())

    def least(self, budget: Budget) -> int:
        """The least that the whole model can cost."""
        cheapest = [0.0] * (self._rows[-1][0] + 1)
        # Smaller sets first: what lies within a removal may save more than the removal.
        for rows, change in sorted(zip(self._rows, self.change(budget), strict=True), key=lambda pair: len(pair[0])):
            if change < sum(cheapest[row] for row in rows):
                own, *others = rows
                cheapest[own] = change
                for row in others:
                    cheapest[row] = 0.0
        return budget.of(self._dense) + int(sum(cheapest))

    def least_loss(self, budgets: Sequence[Budget]) -> npt.NDArray[np.bool_] | None:
        """Which candidates lose least, None where no choice meets the budgets.

        HiGHS tells totals apart only to a millionth of the largest loss, and the largest can be a million times what
        matters. So it is solved again without the candidates that alone lose more than the answer did.
        """
        losses = np.array([candidate.loss for _, candidate in self.flat])
        allowed = np.ones(len(losses), np.bool_)
        while (chosen := self.solve(losses, budgets, allowed)) is not None:
            total = losses[chosen].sum()
            if losses[allowed].max() <= _SAME_SCALE * total:
                break
            allowed = losses <= total
        return chosen

    def solve(
        self, objective: Array, budgets: Sequence[Budget], allowed: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.bool_] | None:
        """Which of the allowed candidates minimise the objective, None where no choice meets the budgets."""
        size = len(self.flat)
        allowed = np.ones(size, np.bool_) if allowed is None else allowed
        columns = np.repeat(np.arange(size), [len(rows) for rows in self._rows])
        one_each = csr_array((np.ones(len(columns)), (np.concatenate(self._rows), columns)))
        scaled = np.where(allowed, objective, 0) / max(np.abs(objective[allowed]).max(), np.finfo(np.float64).tiny)
        with _native_stdout_silenced():
            result = milp(
                scaled, constraints=[LinearConstraint(one_each, 1, 1), *map(self._bound, budgets)],
                integrality=np.ones(size, np.int64), bounds=Bounds(0, allowed.astype(float)),
                options={"mip_rel_gap": _RELATIVE_GAP, "time_limit": _SECONDS},
            )  # fmt: skip
        if result.x is None and result.status != _INFEASIBLE:
            raise KfeError(f"the allocation could not be solved: {result.message}")
        return None if result.x is None else result.x > 0.5

    def _bound(self, budget: Budget) -> LinearConstraint:
        change, dense = self.change(budget), budget.of(self._dense)
        scale, unit = max(np.abs(change).max(), 1.0), max(int(np.gcd.reduce(change.astype(np.int64))), 1)
        room = budget.limit(budget.of(self._original)) - dense
        # Sums are multiples of the unit, so half of one more is no more, and HiGHS, which exceeds a bound by its
        # tolerance, needs less where costs are huge; but the least that the model can cost must stay feasible.
        limit = max((room // unit + 0.5) * unit - _TOLERANCE * scale, self.least(budget) - dense)
        return LinearConstraint(change[None] / scale, -np.inf, limit / scale)


@contextlib.contextmanager
def _native_stdout_silenced() -> Iterator[None]:
    """Keep what C++ prints past ``sys.stdout`` off the output: HiGHS left a debugging line in."""
    flush = ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush
    try:
        saved = os.dup(_STDOUT)
    except OSError:  # closed
        yield
        return
    flush(None)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), _STDOUT)
    try:
        yield
    finally:
        flush(None)
        os.dup2(saved, _STDOUT)
        os.close(saved)
