"""From a torch module to ONNX: by torch's current exporter, and compared with torch before it is called done."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.exporting._factory import ModuleInput, build_module, load_weights
from onnx_kfe.exporting._torch import evaluating, import_torch, parameter_names, quiet, reason
from onnx_kfe.runtime import create_session

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["export", "export_factory"]

Dynamic = Mapping[str, Mapping[int, str]]

_CHECKED_BATCHES = (1, 3)
_TOLERANCE = 1e-4
_EXTERNAL_ABOVE = 2**31 - 2**20  # bytes of weights: protobuf holds less than 2 GiB in one message


def export(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...] | Mapping[str, Tensor],
    output: str | Path | None = None,
    *,
    opset: int | None = None,
    dynamic: Dynamic | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """Export a torch module to ONNX and compare the two on random inputs.

    The module runs in evaluation mode and gets its own mode back. The comparison draws inputs from the values of the
    example, for batches of 1 and 3 where axis 0 is dynamic; every output must agree to a relative 1e-4.

    Args:
        module: The module.
        example_inputs: What ``forward`` takes: a tuple of tensors by position, or tensors by parameter name.
        output: The file to write, whole or not at all; weights above 2 GiB go beside it, to ``<output>.data``.
        opset: ONNX operator set; the exporter's own choice when None.
        dynamic: The axes whose size is left open, as ``{"x": {0: "batch"}}``; axis 0 of every input when None, no
            axis when empty.
        input_names: Names of the ONNX inputs, in the order of the example; those of forward's parameters when None.
        output_names: Names of the ONNX outputs; when None the keys of a mapping that forward returns, else
            ``output``, or ``output_0``, ``output_1``, ... where there are several.

    Returns:
        The model.

    Raises:
        KfeError: torch is missing, the module cannot be exported, the result differs from torch, or the file cannot
            be written.
        UsageError: The names, the dynamic axes or the opset cannot be.
    """
    torch = import_torch()
    keywords = list(example_inputs) if isinstance(example_inputs, Mapping) else None
    tensors = list(example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs)
    names = list(input_names or keywords or parameter_names(module)[: len(tensors)])
    if len(names) != len(tensors):
        raise UsageError(f"{len(tensors)} inputs have {len(names)} names: {', '.join(names)}")
    axes = _dynamic_axes(names, tensors, dynamic)
    call = _Call(module, keywords, names, output_names)
    destination = None if output is None else Path(output)

    with _scratch_file(destination) as scratch, evaluating(module), torch.no_grad(), quiet():
        model = _convert(call, [_without_unit_axes(*pair) for pair in zip(tensors, axes, strict=True)], axes, opset)
        _save(model, scratch)
        for batch in _CHECKED_BATCHES if any(0 in own for own in axes) else (None,):
            values = [_draw(t, batch if 0 in own else None) for t, own in zip(tensors, axes, strict=True)]
            _compare(call, values, scratch)
        proto = ir.to_proto(model)
        if destination is not None:
            _publish(scratch, destination)
    return proto


def export_factory(
    spec: str,
    output: str | Path,
    inputs: Sequence[ModuleInput],
    checkpoint: str | Path | None = None,
    opset: int | None = None,
    dynamic: Dynamic | None = None,
) -> onnx.ModelProto:
    """Build a module from ``package.module:factory``, load its weights and `export` it.

    Args:
        spec: Where the factory is: a callable without arguments that returns a module (or the module itself). The
            current folder is searched too.
        output: The file to write.
        inputs: The inputs, from `parse_input_shape`. They go to forward by name if every one is the name of a
            parameter, else by position; the ONNX inputs have these names either way.
        checkpoint: A state dict, as ``.safetensors`` or as a torch file (loaded with ``weights_only=True``).
        opset: As in `export`.
        dynamic: As in `export`.

    Returns:
        The model.

    Raises:
        KfeError: The factory or the checkpoint fails, or `export` does.
        UsageError: The specification, the names, the dynamic axes or the opset cannot be.
    """
    module = build_module(spec)
    if checkpoint is not None:
        load_weights(module, Path(checkpoint))
    examples = {item.name: item.example(seed) for seed, item in enumerate(inputs)}
    by_name = set(examples) <= set(parameter_names(module))
    bound = examples if by_name else tuple(examples.values())
    return export(module, bound, output, opset=opset, dynamic=dynamic, input_names=list(examples))


@dataclass(frozen=True)
class _Call:
    """How a module is called: by keyword or position, with the names that its inputs and outputs have in ONNX."""

    module: nn.Module
    keywords: list[str] | None
    input_names: list[str]
    output_names: Sequence[str] | None

    @property
    def title(self) -> str:
        return type(self.module).__name__

    def arguments(self, values: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Positional and keyword arguments of forward."""
        return (tuple(values), {}) if self.keywords is None else ((), dict(zip(self.keywords, values, strict=True)))

    def __call__(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run the module: outputs by name.

        Raises:
            KfeError: forward fails.
            UsageError: It returns more or fewer tensors than there are names.
        """
        args, kwargs = self.arguments(values)
        try:
            result = self.module(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in zip(self.input_names, values, strict=True))
            raise KfeError(f"{self.title} fails in torch on inputs {shapes}: {reason(error)}") from error
        tensors = list(_leaves(result))
        names = self.output_names or _default_names(result, len(tensors))
        if len(names) != len(tensors):
            raise UsageError(f"{self.title} returns {len(tensors)} tensors, but has {len(names)} output names")
        return dict(zip(names, tensors, strict=True))


def _leaves(result: Any) -> Iterator[Tensor]:
    """The tensors in what forward returned, in the exporter's order."""
    if isinstance(result, import_torch().Tensor):
        yield result
    elif isinstance(result, Mapping | tuple | list):
        for item in result.values() if isinstance(result, Mapping) else result:
            yield from _leaves(item)


def _default_names(result: Any, count: int) -> list[str]:
    keys = [key for key, value in result.items() if value is not None] if isinstance(result, Mapping) else []
    if len(keys) == count:
        return keys
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _dynamic_axes(names: list[str], tensors: list[Tensor], dynamic: Dynamic | None) -> list[dict[int, str]]:
    """The dynamic axes of each input, axis 0 of all of them by default."""
    if dynamic is None:
        if len({len(tensor) for tensor in tensors if tensor.ndim}) > 1:
            raise UsageError("the inputs differ in axis 0, so which is the batch? name the dynamic axes (--dynamic)")
        return [{0: "batch"} if tensor.ndim else {} for tensor in tensors]
    for name, axes in dynamic.items():
        if name not in names:
            raise UsageError(f"no input {name!r} to make dynamic: the inputs are {', '.join(names)}")
        shape = list(tensors[names.index(name)].shape)
        if beyond := [axis for axis in axes if not 0 <= axis < len(shape)]:
            raise UsageError(f"input {name!r} of shape {shape} has no axis {beyond[0]} to make dynamic")
    return [dict(dynamic.get(name, {})) for name in names]


def _without_unit_axes(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    """Repeat dynamic axes of size 1, which the exporter would take for a constant."""
    return tensor.repeat([2 if axis in axes and size == 1 else 1 for axis, size in enumerate(tensor.shape)])


def _convert(call: _Call, values: Sequence[Tensor], axes: list[dict[int, str]], opset: int | None) -> ir.Model:
    """Run the exporter, and check that the model has the interface that was asked for."""
    outputs = list(call(values))
    try:
        model = _torch_export(call, values, axes, opset, outputs)
    except Exception as error:
        advice = ""
        if any(axes):
            with contextlib.suppress(Exception):
                _torch_export(call, values, [{} for _ in axes], opset, outputs)
                advice = "; with fixed sizes it can (--dynamic none)"
        raise KfeError(f"torch cannot export {call.title}: {reason(error)}{advice}") from error
    written = model.opset_imports[""]
    if opset is not None and written != opset:
        raise UsageError(f"torch cannot write {call.title} in opset {opset}: name one from {written} on, or none")
    found = [str(value.name) for value in model.graph.inputs]
    if found != call.input_names:
        wanted = ", ".join(call.input_names)
        raise KfeError(f"torch exported {call.title} with the inputs {', '.join(found)} instead of {wanted}")
    _forget_sources(model.graph)
    return model


def _torch_export(
    call: _Call, values: Sequence[Tensor], axes: list[dict[int, str]], opset: int | None, outputs: list[str]
) -> ir.Model:
    args, kwargs = call.arguments(values)
    shapes: Any = dict(zip(kwargs, axes, strict=True)) if kwargs else tuple(axes)
    named = len(parameter_names(call.module))
    if len(args) > named:  # the rest goes to forward's *args, which the exporter sees as one argument
        shapes = (*axes[:named], tuple(axes[named:]))
    program = import_torch().onnx.export(
        call.module,
        args,
        kwargs=kwargs,
        dynamic_shapes=shapes,
        opset_version=opset,
        input_names=call.input_names,
        output_names=outputs,
        dynamo=True,
        verbose=False,
    )
    return program.model


def _forget_sources(graph: ir.Graph) -> None:
    """Drop the exporter's stack traces: they are large, and name folders of the user's machine."""
    graph.metadata_props.clear()
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        node.metadata_props.clear()
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()


def _draw(tensor: Tensor, batch: int | None) -> Tensor:
    """Draw a tensor from the values of an example, or from noise where they are all the same.

    Args:
        tensor: The example.
        batch: Size of axis 0; the example's own when None.
    """
    torch = import_torch()
    shape = list(tensor.shape) if batch is None else [batch, *tensor.shape[1:]]
    generator = torch.Generator().manual_seed(batch or 0)
    values = tensor.detach().flatten()
    if values.is_floating_point() and bool((values == values[0]).all()):
        return torch.randn(shape, generator=generator).to(values)
    return values[torch.randint(len(values), shape, generator=generator).to(values.device)]


def _array(tensor: Tensor) -> np.ndarray:
    try:
        return tensor.detach().cpu().numpy()
    except TypeError as error:
        raise KfeError(f"{tensor.dtype} cannot be compared in numpy: export the module as float32") from error


def _compare(call: _Call, values: Sequence[Tensor], path: Path) -> None:
    """Run a module and its export on the same inputs; they may differ by a ten-thousandth of the largest value."""
    feeds = {name: _array(value) for name, value in zip(call.input_names, values, strict=True)}
    outputs = call(values)
    session = create_session(path)
    try:
        results = session.run(list(outputs), feeds)
    except Exception as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
        raise KfeError(f"ONNX Runtime fails on the export of {call.title} with {shapes}: {reason(error)}") from error
    for (name, tensor), found in zip(outputs.items(), results, strict=True):
        wanted = _array(tensor)
        difference = _difference(wanted, found)
        # Half precision cannot agree to more than its own rounding.
        tolerance = max(_TOLERANCE, 4 * np.finfo(wanted.dtype).eps) if wanted.dtype.kind == "f" else _TOLERANCE
        if not difference <= tolerance:
            raise KfeError(
                f"the export of {call.title} differs from torch in output {name!r}, shape {list(wanted.shape)}: "
                f"by {difference:.2g} of the largest value, {tolerance:.1g} is allowed; nothing was written"
            )


def _difference(wanted: np.ndarray, found: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite where the shapes differ."""
    if wanted.shape != found.shape:
        return float("inf")
    if np.array_equal(wanted, found, equal_nan=wanted.dtype.kind == "f"):
        return 0.0
    wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    with np.errstate(all="ignore"):
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@contextlib.contextmanager
def _scratch_file(destination: Path | None) -> Iterator[Path]:
    """A file to write first, in a folder beside the destination that is removed in the end."""
    if destination is not None and destination.is_dir():
        raise KfeError(f"cannot write {destination}: it is a folder, name a file")
    parent = None if destination is None else destination.parent
    try:
        folder = tempfile.TemporaryDirectory(dir=parent, prefix=".onnx-kfe-")
    except OSError as error:
        raise KfeError(f"cannot write {destination}: {error.strerror}") from error
    with folder:
        yield Path(folder.name) / ("model.onnx" if destination is None else destination.name)


def _save(model: ir.Model, path: Path) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        ir.save(model, path, external_data=f"{path.name}.data" if size > _EXTERNAL_ABOVE else None)
    except OSError as error:
        raise KfeError(f"cannot write {path.name}: {error.strerror or error}") from error


def _publish(scratch: Path, destination: Path) -> None:
    """Move what was written to its place, the weights first."""
    try:
        for file in sorted(scratch.parent.iterdir(), reverse=True):  # <name>.data sorts after <name>
            os.replace(file, destination.parent / file.name)
    except OSError as error:
        raise KfeError(f"cannot write {destination}: {error.strerror}") from error
