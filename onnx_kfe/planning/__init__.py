"""Planning: forms and their costs, budgets, allocation, the plan file."""

from onnx_kfe.planning._allocation import DENSE, Candidate, allocate, candidates
from onnx_kfe.planning._budget import Budget, Macs, Params
from onnx_kfe.planning._forms import FORMS, Cost, Form, Stage, compose, dense_cost, rank_grid
from onnx_kfe.planning._plan import DEFAULT_ROUND_TO, Plan, make_plan, network_cost, plan_from_weights
from onnx_kfe.planning._problem import GroupProblem, LayerProblem

__all__ = [
    "DEFAULT_ROUND_TO",
    "DENSE",
    "FORMS",
    "Budget",
    "Candidate",
    "Cost",
    "Form",
    "GroupProblem",
    "LayerProblem",
    "Macs",
    "Params",
    "Plan",
    "Stage",
    "allocate",
    "candidates",
    "compose",
    "dense_cost",
    "make_plan",
    "network_cost",
    "plan_from_weights",
    "rank_grid",
]
