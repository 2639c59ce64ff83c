"""Planning: forms and their costs, budgets, allocation, the plan file."""

from onnx_kfe.planning._allocation import DENSE, Candidate, allocate, candidates, frontier
from onnx_kfe.planning._bandit import Refinement, arms_around, refine
from onnx_kfe.planning._budget import Budget, Macs, Params
from onnx_kfe.planning._forms import FORMS, Cost, Form, Stage, compose, dense_cost, rank_grid
from onnx_kfe.planning._plan import DEFAULT_ROUND_TO, Plan, Planner, make_plan, network_cost, plan_from_weights
from onnx_kfe.planning._problem import GroupProblem, LayerProblem
from onnx_kfe.planning._search import Attempt, meets, search

__all__ = [
    "DEFAULT_ROUND_TO",
    "DENSE",
    "FORMS",
    "Attempt",
    "Budget",
    "Candidate",
    "Cost",
    "Form",
    "GroupProblem",
    "LayerProblem",
    "Macs",
    "Params",
    "Plan",
    "Planner",
    "Refinement",
    "Stage",
    "allocate",
    "arms_around",
    "candidates",
    "compose",
    "dense_cost",
    "frontier",
    "make_plan",
    "meets",
    "network_cost",
    "plan_from_weights",
    "rank_grid",
    "refine",
    "search",
]
