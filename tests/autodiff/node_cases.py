"""The node cases of the ONNX backend test as checks of vector-Jacobian products against central differences.

Each case is perturbed off the kinks and steps its round numbers sit on, and the derivative in a few random directions,
taken in float64, is compared with the product of the gradient and the direction. The forward pass runs in ONNX Runtime
where it has the operator in float64, else in the reference evaluator; the backward graph always in ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx.reference import ReferenceEvaluator

from onnx_kfe.autodiff import append_gradients
from onnx_kfe.runtime import create_session

OPSET = 21
MIN_OPSET = 13
RELEASED_OPSET = 25
"""Later ones ONNX Runtime refuses; cases of the opset in development are tried as if they were of this one."""
PARAMETERS = {"Resize": (1, 2), "Dropout": (1,), "Range": (0, 1, 2), "OneHot": (2,)}
"""Float inputs that are settings rather than something to differentiate by."""
DIRECTIONS = 3
TOLERANCE = {TensorProto.DOUBLE: 1e-4, TensorProto.FLOAT: 2e-3}
STEPS = (1e-6, 1e-4, 1e-2)
"""Of the differences: small for kinks and curvature, larger where the forward pass rounds to float32 inside."""
TOO_SLOW = 50_000
"""Elements of an input beyond which the reference evaluator takes too long."""

Forward = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


class Outcome(StrEnum):
    """What became of a case."""

    PASSED = "passed"
    NO_RULE = "no rule"
    NOT_APPLICABLE = "not applicable"
    WRONG = "wrong"


@dataclass(frozen=True)
class Result:
    """The outcome of one case, and why."""

    name: str
    operator: str
    outcome: Outcome
    detail: str = ""


class NotApplicable(Exception):
    """The case has nothing to differentiate, or nothing here runs it."""


class Refused(Exception):
    """ONNX Runtime refuses the backward graph."""


@dataclass(frozen=True)
class Case:
    """A model with its inputs."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]

    @property
    def operator(self) -> str:
        """The operator under test; for an expanded case the one it expands."""
        return self.model.graph.node[0].op_type


@cache
def collect() -> list[Case]:
    """The cases whose inputs and outputs are all tensors."""
    from onnx.backend.test.case.node import collect_testcases

    cases = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            tensors = all(v.type.HasField("tensor_type") for v in (*case.model.graph.input, *case.model.graph.output))
            if tensors and all(isinstance(array, np.ndarray | np.generic) for array in case.data_sets[0][0]):
                names = [value.name for value in case.model.graph.input]
                inputs = {name: np.asarray(array) for name, array in zip(names, case.data_sets[0][0], strict=True)}
                cases.append(Case(case.name, case.model, inputs))
    return cases


def check(case: Case) -> Result:
    """Compare the gradients of a case with differences."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            outcome, detail = _check(case)
    except NotApplicable as reason:
        outcome, detail = Outcome.NOT_APPLICABLE, str(reason)
    except Refused as reason:
        outcome, detail = Outcome.WRONG, str(reason)
    return Result(case.name, case.operator, outcome, detail)


def _check(case: Case) -> tuple[Outcome, str]:
    rng = np.random.default_rng(0)
    node = case.model.graph.node[0]
    settings = {node.input[index] for index in PARAMETERS.get(node.op_type, ()) if index < len(node.input)}
    points = {
        name: (array + 1e-2 * (1 + np.abs(array)) * rng.standard_normal(array.shape)).astype(np.float64)
        for name, array in case.inputs.items()
        if array.dtype in (np.float32, np.float64) and name not in settings
    }
    if not points:
        raise NotApplicable("no float input")
    model = _prepared(case, set(points))
    forward, outputs = _forward(model, points)
    seeds = {name: rng.standard_normal(array.shape) for name, array in outputs.items()}
    gradients, dtype, blocked = _gradients(model, points, seeds)
    if any("optional outputs" in reason for reason in blocked.values()):
        seeds = {name: seed * (index == 0) for index, (name, seed) in enumerate(seeds.items())}
        gradients, dtype, blocked = _gradients(model, points, seeds)
    no_rule = {name: reason for name, reason in blocked.items() if reason != "no path to a head"}
    finite = all(np.isfinite(gradient).all() for gradient in gradients.values())
    if not finite and not _finite_within(model, points):
        raise NotApplicable("not finite within")
    wrong = []
    for name in (name for name in points if name not in no_rule):
        gradient = gradients.get(name, np.zeros(()))
        error = _worst_error(forward, points, name, seeds, gradient, TOLERANCE[dtype])
        if error >= TOLERANCE[dtype]:
            wrong.append(f"{name}: {error:.1e}")
    if wrong:
        return Outcome.WRONG, "; ".join(wrong)
    detail = "; ".join(f"{name}: {reason}" for name, reason in no_rule.items())
    if not gradients:
        return (Outcome.NO_RULE, detail) if no_rule else (Outcome.NOT_APPLICABLE, "no derivative")
    return Outcome.PASSED, detail


def _worst_error(
    forward: Forward,
    points: dict[str, np.ndarray],
    name: str,
    seeds: dict[str, np.ndarray],
    gradient: np.ndarray,
    tolerance: float,
) -> float:
    """The largest relative error of the slope of the seeded sum of the outputs, over a few directions.

    In each direction the step counts that agrees best: a wrong gradient agrees at none.
    """
    rng = np.random.default_rng(1)
    worst = 0.0
    for _ in range(DIRECTIONS):
        direction = rng.standard_normal(points[name].shape)
        product = float((gradient * direction).sum())
        best = np.inf
        for step in STEPS:
            ahead, behind = (forward({**points, name: points[name] + s * step * direction}) for s in (1, -1))
            slopes = [(after - before) / (2 * step) for after, before in zip(ahead, behind, strict=True)]
            terms = [seed * slope for seed, slope in zip(seeds.values(), slopes, strict=True)]
            size = max(sum(float(np.abs(term).sum()) for term in terms), 1e-2)
            error = abs(product - sum(float(term.sum()) for term in terms)) / size
            best = min(best, error) if np.isfinite(error) else best
            if best < tolerance:
                break
        worst = max(worst, best)
    return worst


def _finite_within(model: onnx.ModelProto, points: dict[str, np.ndarray]) -> bool:
    """Whether all that the model computes on the way is finite."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = _run(whole, {name: array.astype(np.float32) for name, array in points.items()}, names) or []
    return all(np.isfinite(array).all() for array in values if array.dtype == np.float32)


def _prepared(case: Case, differentiable: set[str]) -> onnx.ModelProto:
    """The case at the opset of the backward graph, its other inputs as constants."""
    model = _in_single(case.model)
    versions = {opset.domain: opset.version for opset in model.opset_import}
    if set(versions) != {""}:
        raise NotApplicable("another domain")
    if versions[""] < MIN_OPSET:
        raise NotApplicable("an old opset")
    kept = [value for value in model.graph.input if value.name in differentiable]
    tensors = [numpy_helper.from_array(a, name) for name, a in case.inputs.items() if name not in differentiable]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(tensors)
    if any(value.type.tensor_type.elem_type != TensorProto.FLOAT for value in model.graph.output[:1]):
        raise NotApplicable("no float output")
    if versions[""] > RELEASED_OPSET:
        model.opset_import[0].version = RELEASED_OPSET
    elif versions[""] < OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:
            raise NotApplicable("not converted to a later opset") from error
    model.ir_version = 10
    return model


def _forward(model: onnx.ModelProto, points: dict[str, np.ndarray]) -> tuple[Forward, dict[str, np.ndarray]]:
    """The model in float64, with its float outputs at some points."""
    names = [v.name for v in model.graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    single = _run(model, {name: array.astype(np.float32) for name, array in points.items()}, names)
    if single is None:
        raise NotApplicable("ONNX Runtime does not run it")
    if not all(np.isfinite(array).all() for array in single):
        raise NotApplicable("not finite")
    for forward in _candidates(model, names, points):
        try:
            double, again = forward(points), forward(points)
        except Exception:
            continue
        close = all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(single, double, strict=True))
        if close and all(np.array_equal(a, b) for a, b in zip(double, again, strict=True)):
            return forward, dict(zip(names, double, strict=True))
    raise NotApplicable("not deterministic, or not in float64")


def _candidates(model: onnx.ModelProto, names: list[str], points: dict[str, np.ndarray]) -> Iterator[Forward]:
    double = _in_double(model)
    with contextlib.suppress(Exception):
        session = create_session(double.SerializeToString(), threads=1)
        yield lambda feeds: session.run(names, feeds)
    if sum(array.size for array in points.values()) < TOO_SLOW:
        with contextlib.suppress(Exception):
            evaluator = ReferenceEvaluator(double)
            yield lambda feeds: [np.asarray(array, np.float64) for array in evaluator.run(names, feeds)]


def _gradients(
    model: onnx.ModelProto, points: dict[str, np.ndarray], seeds: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], int, dict[str, str]]:
    """The gradients by the inputs and the type they were computed in, and why others are missing."""
    for source, dtype in ((_in_double(model), TensorProto.DOUBLE), (model, TensorProto.FLOAT)):
        backward, blocked, wanted = _with_gradients(source, list(points), seeds, dtype)
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        feeds = {name: array.astype(kind) for name, array in points.items()}
        feeds |= {_seed(name): array.astype(kind) for name, array in seeds.items()}
        values = _run(backward, feeds, list(wanted.values()))
        if values is not None:
            return dict(zip(wanted, values, strict=True)), dtype, blocked
    raise Refused("ONNX Runtime does not run the backward graph")


def _with_gradients(
    model: onnx.ModelProto, inputs: list[str], seeds: dict[str, np.ndarray], dtype: int
) -> tuple[onnx.ModelProto, dict[str, str], dict[str, str]]:
    inferred = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, data_prop=True))
    graph = inferred.graph
    heads = {}
    for value in graph.outputs:
        if value.name in seeds and seeds[value.name].any():
            shape = ir.Shape(seeds[value.name].shape)
            heads[value] = ir.Value(name=_seed(value.name), type=ir.TensorType(ir.DataType(dtype)), shape=shape)
    graph.inputs.extend(heads.values())
    wanted = {value: value.name for value in graph.inputs if value.name in inputs}
    gradients = append_gradients(graph, heads, list(wanted))
    names = {}
    for value, cotangent in gradients.cotangents.items():
        output = ir.node("Identity", [cotangent])
        output.outputs[0].name = names[str(value.name)] = f"gradient of {value.name}"
        output.outputs[0].type = value.type
        graph.append(output)
        graph.outputs.append(output.outputs[0])
    blocked = {str(value.name): reason for value, reason in gradients.blocked.items()}
    return ir.serde.serialize_model(inferred), blocked, names


def _seed(name: str) -> str:
    return f"seed of {name}"


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], names: list[str]) -> list[np.ndarray] | None:
    """The named outputs, or None if ONNX Runtime does not load or run the model."""
    if not names:
        return []
    try:
        session = create_session(model.SerializeToString(), threads=1)
        wanted = {value.name for value in session.get_inputs()}
        return session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    except Exception as error:
        if os.environ.get("NODE_CASES_VERBOSE"):
            print(str(error)[:500])
        return None


def _in_single(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 inputs and outputs wherever it has float64."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in (*single.graph.input, *single.graph.output, *single.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return single


def _in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float64 wherever it has float32."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    settings = {
        node.input[index]
        for node in double.graph.node
        for index in PARAMETERS.get(node.op_type, ())
        if index < len(node.input)
    }
    for value in (*double.graph.input, *double.graph.output, *double.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in double.graph.initializer:
        if tensor.name not in settings:
            _widen(tensor)
    for node in double.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
            elif attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            elif node.op_type == "Constant" and attribute.type == onnx.AttributeProto.FLOAT:
                value = numpy_helper.from_array(np.array(attribute.f, np.float64))
                attribute.CopyFrom(helper.make_attribute("value", value))
    return double


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), name))
