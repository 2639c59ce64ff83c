"""Planning: forms and their costs, budgets, allocation, the plan file."""

from onnx_kfe.planning._allocation import DENSE, Candidate, allocate, candidates, frontier
from onnx_kfe.planning._budget import Budget, Macs, Params
from onnx_kfe.planning._chain import Cost, Link, Stage, chain_cost, compose, dense_cost, dense_link, sized
from onnx_kfe.planning._forms import FORMS, Form, rank_grid
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
    "Link",
    "Macs",
    "Params",
    "Plan",
    "Planner",
    "Stage",
    "allocate",
    "candidates",
    "chain_cost",
    "compose",
    "dense_cost",
    "dense_link",
    "frontier",
    "make_plan",
    "meets",
    "network_cost",
    "plan_from_weights",
    "rank_grid",
    "search",
    "sized",
]
