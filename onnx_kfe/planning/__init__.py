"""Planning: forms and their costs, budgets, allocation, the plan file."""

from onnx_kfe.planning._allocation import DENSE, REMOVED, Candidate, allocate, candidates
from onnx_kfe.planning._any_planner import AnyPlanner
from onnx_kfe.planning._bandit import Refinement, arms_around, refine
from onnx_kfe.planning._budget import Budget, Latency, Macs, Milliseconds, Params, describe
from onnx_kfe.planning._chain import Cost, Link, Stage, chain_cost, compose, dense_cost, dense_link, layer_cost, sized
from onnx_kfe.planning._channels import ChannelPlanner, CutLayer, cut_layer
from onnx_kfe.planning._direction_forms import DirectionChain, Directions, three_factors
from onnx_kfe.planning._directions import DirectionPlanner
from onnx_kfe.planning._form import Form, rank_grid
from onnx_kfe.planning._forms import FORMS
from onnx_kfe.planning._latency import DEFAULT_ROUND_TO, LatencyModel, measure_latency_model
from onnx_kfe.planning._methods import METHODS, Method, find_method
from onnx_kfe.planning._plan import Plan, network_cost
from onnx_kfe.planning._planner import Planner
from onnx_kfe.planning._problem import GroupProblem, LayerProblem
from onnx_kfe.planning._removal import removal_loss, removals
from onnx_kfe.planning._search import Attempt, meets, search
from onnx_kfe.planning._threshold import ThresholdPlanner

__all__ = [
    "DEFAULT_ROUND_TO",
    "DENSE",
    "FORMS",
    "METHODS",
    "REMOVED",
    "AnyPlanner",
    "Attempt",
    "Budget",
    "Candidate",
    "ChannelPlanner",
    "Cost",
    "CutLayer",
    "DirectionChain",
    "DirectionPlanner",
    "Directions",
    "Form",
    "GroupProblem",
    "Latency",
    "LatencyModel",
    "LayerProblem",
    "Link",
    "Macs",
    "Method",
    "Milliseconds",
    "Params",
    "Plan",
    "Planner",
    "Refinement",
    "Stage",
    "ThresholdPlanner",
    "allocate",
    "arms_around",
    "candidates",
    "chain_cost",
    "compose",
    "cut_layer",
    "dense_cost",
    "dense_link",
    "describe",
    "find_method",
    "layer_cost",
    "measure_latency_model",
    "meets",
    "network_cost",
    "rank_grid",
    "refine",
    "removal_loss",
    "removals",
    "search",
    "sized",
    "three_factors",
]
