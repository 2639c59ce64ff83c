"""Refinement of a plan by measurements: a factored bandit that plays near the plan it starts from.

The Temporary Elimination Algorithm (TEA), with one Temporary Elimination Module (TEM) a factor, of Zimmert and Seldin,
"Factored Bandits", NeurIPS 2018. A layer is a factor, its candidates are the arms. In a round every active arm of a
factor is played about once, in a random pairing with the arms of the others; a module learns the differences of its own
arms within rounds and leaves out those that another beats by more than the confidence. That grows with the time played,
so an arm that is out by little comes back. What differs from the paper, and why:

* Confidences are Student's, from the variance of the differences seen: the paper's rewards are in [0, 1], but nothing
  bounds a cost in nats. They hold where the means of the differences are about normal, and are no guarantee elsewhere.
* A cost far above the least of its round counts as 4 of the usual gaps between the two least, infinity and NaN too: one
  wild or failing model would else hide what the innocent arms that were part of it are worth.
* The paper assumes *uniform identifiability*: one arm of a factor is the best whatever the other factors play. That
  fails here. The loss is curved, so that errors of layers add up or cancel. A layer behind a damaged one gets other
  inputs, on which another rank may be best. A ReLU passes or cuts off an error depending on what comes from the layers
  before it. Budgets couple the layers: a rank that one gains another must give. A refit afterwards solves every layer
  anew and takes more of the loss from some forms than from others. So nothing is asked here but which arms are best
  *near the start*, the K-FAC optimum: in a round only about the square root of the number of layers explore, so that
  the pairs that can interact are no more than the layers, while the others play the best arms known, which are the
  start's unless another beats them. Budgets are left to a price in the costs and to `feasible`; a refit counts only
  where `evaluate` makes one. And as no bound of the paper then holds for many changes together, the plan that they make
  is compared with the start on rounds not used before and taken only where it is measured to be better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from onnx_kfe.kfe import Array
from onnx_kfe.planning._allocation import Candidate, hull
from onnx_kfe.planning._budget import Budget, Macs

__all__ = ["Refinement", "arms_around", "refine"]

Choices = Mapping[str, Candidate]

_COMPARED = 1 / 4  # share of the evaluations that the comparison at the end gets
_FEWEST_PAIRS = 6  # in it
_REACH = 4.0  # usual gaps between the two least costs of a round above which costs count alike
_RISK = 0.05  # that a proposal no better than the start passes it
_SURENESS = 1.0  # standard errors by which an arm must beat the start's to take its place


@dataclass(frozen=True)
class Refinement:
    """What came of a refinement.

    Attributes:
        choices: Candidate by layer: the start's, or those of a plan measured to be better.
        gain: Mean cost of the start less that of the proposed plan in the comparison at the end, in the unit of the
            costs, whether it was taken or not; NaN where nothing was proposed or a model failed.
        error: Standard error of the gain.
        evaluations: How many were made.
        is_start: Whether the choices are the start's: nothing was proposed, or no gain is sure.
    """

    choices: dict[str, Candidate]
    gain: float
    error: float
    evaluations: int
    is_start: bool


def refine(
    start: Choices,
    arms: Mapping[str, Sequence[Candidate]],
    evaluate: Callable[[Choices, int], float],
    evaluations: int,
    *,
    seed: int = 0,
    feasible: Callable[[Choices], bool] = lambda choices: True,
) -> Refinement:
    """Look near a plan for one that costs less, by noisy measurements of whole models.

    A quarter of the evaluations, 12 at least, compares the plan made of the best arms with the start, pair by pair on
    rounds of their own. That plan is returned where a one-sided t-test at 5 % finds it better, else the start: in at
    most about one refinement in 20, then, a plan that is worse than the start.

    Args:
        start: Candidate by layer.
        arms: Candidates to try by layer, the start's among them; layers without are left as they are.
        evaluate: Cost of choices, the lower the better, measured on the data of a round. Rounds are numbered from 0;
            all choices of a round must be measured on the same data, other rounds on other data. The cost should
            contain a price of what a budget limits, or the dearest arms win. Infinity or NaN is a model that fails;
            where one does in the comparison, the start is returned.
        evaluations: The most calls of `evaluate`.
        seed: Of the pairings.
        feasible: Whether choices may be returned. Where the best arms together may not, they replace the start's one by
            one, the surest that may come first; what is only tried need not be feasible.

    Raises:
        ValueError: The start is not among the arms of a layer.
    """
    modules = {name: _Module(choices, start[name]) for name, choices in arms.items() if list(choices) != [start[name]]}
    rounds = _Rounds(evaluate)
    pairs = max(int(_COMPARED * evaluations) // 2, _FEWEST_PAIRS)
    _explore(start, modules, rounds, evaluations - 2 * pairs, np.random.default_rng(seed))
    proposal = _proposal(start, modules, feasible)
    if proposal == start:
        return Refinement(proposal, math.nan, math.nan, rounds.evaluations, is_start=True)
    costs = np.array([rounds.play([start, proposal]) for _ in range(pairs)])
    gains = np.subtract(*np.where(np.isfinite(costs), costs, np.nan).T)
    gain, error = float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(pairs)
    better = bool(gain > -stdtrit(pairs - 1, _RISK) * error)  # not where a model failed: NaN is above nothing
    return Refinement(proposal if better else dict(start), gain, error, rounds.evaluations, is_start=not better)


def arms_around(
    options: Sequence[Candidate], start: Candidate, count: int, kind: type[Budget] = Macs
) -> list[Candidate]:
    """The start and up to `count` candidates nearest to it in cost on the lower convex hull of loss against cost.

    Half of them are cheaper and half dearer while there are both; an odd one is cheaper.

    Args:
        options: Candidates of a layer, the layer as it is among them.
        start: One of them, on the hull or not.
        count: How many besides the start.
        kind: The budget that says which cost.
    """
    cost = kind(1).of
    others = [choice for choice in hull(options, kind) if choice != start]  # dear to cheap
    cheaper = [choice for choice in others if cost(choice.cost) < cost(start.cost)]
    dearer = [choice for choice in others if cost(choice.cost) >= cost(start.cost)][::-1]
    nearest = [choice for choice in chain(*zip_longest(cheaper, dearer)) if choice is not None]
    return [start, *nearest[:count]]


class _Rounds:
    """Plays joint actions round by round and counts."""

    def __init__(self, evaluate: Callable[[Choices, int], float]) -> None:
        self._evaluate = evaluate
        self._number = 0
        self._gaps: list[float] = []
        self.evaluations = 0

    def play(self, actions: Sequence[Choices]) -> Array:
        """Costs of the actions on the data of the next round."""
        costs = np.array([self._evaluate(action, self._number) for action in actions], np.float64)
        self._number += 1
        self.evaluations += len(actions)
        return costs

    def tamed(self, costs: Array) -> Array:
        """The costs of a round, those that are not finite or far above the least brought near it."""
        finite = np.sort(costs[np.isfinite(costs)])
        if not len(finite):
            return np.zeros(len(costs))
        self._gaps.extend(gap for gap in np.diff(finite[:2]) if gap > 0)
        reach = _REACH * float(np.median(self._gaps)) if self._gaps else 1.0
        return np.where(np.isfinite(costs), np.minimum(costs, finite[0] + reach), finite[0] + reach)


class _Module:
    """What is known of the arms of one layer: their differences in cost within rounds, arm against arm."""

    def __init__(self, arms: Sequence[Candidate], start: Candidate) -> None:
        self.arms = list(arms)
        self.rounds = 0
        self._start = self.arms.index(start)
        self._count, self._sum, self._squares = np.zeros((3, len(self.arms), len(self.arms)))

    def learn(self, played: npt.NDArray[np.intp], costs: Array) -> None:
        """Take in the arms played in a round and the costs they were part of."""
        means = np.full(len(self.arms), np.nan)
        for arm in np.unique(played):
            means[arm] = costs[played == arm].mean()
        differences = means[:, None] - means
        self.rounds += 1
        self._count += np.isfinite(differences)
        self._sum += np.nan_to_num(differences)
        self._squares += np.nan_to_num(differences) ** 2

    def active(self, time: int) -> npt.NDArray[np.intp]:
        """The arms that no other beats by more than the confidence after so many evaluations."""
        mean, error = self._differences()
        level = 1 / (2 * len(self.arms) * max((time + 1) * math.log(time + 1) ** 2, 1.0))
        beaten = (mean > -stdtrit(np.maximum(self._count - 1, 1), level) * error).any(1)
        return np.flatnonzero(beaten.all() | ~beaten)

    def best(self) -> tuple[Candidate, float]:
        """The arm that others beat least, and by how many standard errors it beats the start's; else that, and 0."""
        mean, error = self._differences()
        best = int(mean.max(1).argmin())
        gain, doubt = -mean[best, self._start], error[best, self._start]
        if gain <= _SURENESS * doubt:
            return self.arms[self._start], 0.0
        return self.arms[best], gain / doubt if doubt > 0 else math.inf

    def _differences(self) -> tuple[Array, Array]:
        """Mean cost of each arm less that of each other, and its standard error, infinite below two rounds."""
        count = np.maximum(self._count, 1)
        mean = self._sum / count
        variance = np.maximum(self._squares / count - mean**2, 0) / np.maximum(count - 1, 1)
        return mean, np.where(self._count > 1, np.sqrt(variance), np.inf)


def _explore(
    start: Choices, modules: Mapping[str, _Module], rounds: _Rounds, evaluations: int, rng: np.random.Generator
) -> None:
    """Play rounds until the evaluations are used up or one arm is left to every layer."""
    while True:
        active = {name: module.active(rounds.evaluations) for name, module in modules.items()}
        unsettled = sorted(
            (name for name, left in active.items() if len(left) > 1),
            key=lambda name: (modules[name].rounds, rng.random()),
        )
        exploring = unsettled[: math.ceil(math.sqrt(len(modules)))]
        plays = max((len(active[name]) for name in exploring), default=0)
        if plays == 0 or rounds.evaluations + plays > evaluations:
            return
        pairing = {name: rng.permutation(np.resize(rng.permutation(active[name]), plays)) for name in exploring}
        usual = {**start, **{name: module.best()[0] for name, module in modules.items()}}
        costs = rounds.play([
            {**usual, **{name: modules[name].arms[played[play]] for name, played in pairing.items()}}
            for play in range(plays)
        ])  # fmt: skip
        costs = rounds.tamed(costs)
        for name, played in pairing.items():
            modules[name].learn(played, costs)


def _proposal(
    start: Choices, modules: Mapping[str, _Module], feasible: Callable[[Choices], bool]
) -> dict[str, Candidate]:
    """The best arms, as many of them as are feasible, the surest first."""
    best = {name: module.best() for name, module in modules.items()}
    changes = {name: best[name][0] for name in sorted(best, key=lambda name: -best[name][1])}
    proposal = {**start, **changes}
    if feasible(proposal):
        return proposal
    proposal = dict(start)
    while True:
        tried = ({**proposal, name: arm} for name, arm in changes.items() if arm != proposal[name])
        if (following := next(filter(feasible, tried), None)) is None:
            return proposal
        proposal = following
