"""What the command line says about a torch module: where it is built, which weights it gets, what its inputs are."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.exporting._torch import import_torch, reason

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ModuleInput", "build_module", "load_weights", "parse_dynamic", "parse_input_shape"]

_DTYPES = ("float32", "float16", "float64", "int64", "int32", "uint8", "bool")


class ModuleInput(NamedTuple):
    """One input of a module: its name, its element type (a numpy name) and the shape of an example."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def example(self, seed: int) -> Tensor:
        """Random values: normal for floats, and zeros and ones for integers, which are indices into any embedding."""
        torch = import_torch()
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        return (noise if self.dtype.startswith("float") else noise > 0).to(getattr(torch, self.dtype))


def parse_input_shape(text: str) -> ModuleInput:
    """Read ``name:1,3,224,224`` or ``name:int64:1,128``; the type is float32 where it is left out.

    Raises:
        UsageError: The text is not of this form.
    """
    name, *types, shape = text.split(":") if ":" in text else ("", text)
    dtype = types[0] if types else "float32"
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = ()
    if not name or len(types) > 1 or not sizes or min(sizes) < 1:
        raise UsageError(f"--input-shape {text!r}: write it as x:1,3,224,224 or ids:int64:1,128")
    if dtype not in _DTYPES:
        raise UsageError(f"--input-shape {text!r}: no type {dtype!r}, it can be {', '.join(_DTYPES)}")
    return ModuleInput(name, dtype, sizes)


def parse_dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]] | None:
    """Read the ``--dynamic`` options: each ``x:0=batch``, or a single ``none`` for fixed sizes.

    Returns:
        What `onnx_kfe.exporting.export` takes as ``dynamic``: None when there are no texts, ``{}`` for ``none``.

    Raises:
        UsageError: A text is not of this form.
    """
    if not texts:
        return None
    dynamic: dict[str, dict[int, str]] = {}
    for text in texts if list(texts) != ["none"] else []:
        name, _, rest = text.partition(":")
        axis, _, size = rest.partition("=")
        if not (name and axis.isdecimal() and size.isidentifier()):
            raise UsageError(f"--dynamic {text!r}: write it as x:0=batch, or a single none for fixed sizes")
        dynamic.setdefault(name, {})[int(axis)] = size
    return dynamic


def build_module(spec: str) -> nn.Module:
    """Build the module that ``package.module:factory`` names; the current folder is searched too.

    Raises:
        UsageError: The text is not of this form.
        KfeError: The factory cannot be imported or called, or does not return a module.
    """
    torch = import_torch()
    module_name, _, attribute = spec.partition(":")
    if not (module_name and attribute):
        raise UsageError(f"{spec!r} does not name a factory: write it as package.module:factory")
    with _current_folder_importable():
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:
            raise KfeError(f"cannot import {spec}: {reason(error)}") from error
        if isinstance(factory, torch.nn.Module):
            return factory
        if not callable(factory):
            raise KfeError(f"{spec} is {type(factory).__name__}, not callable: name a function that returns a module")
        try:
            module = factory()
        except Exception as error:
            raise KfeError(f"{spec}() failed: {reason(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise KfeError(f"{spec}() returned {type(module).__name__}, not a torch.nn.Module")
    return module


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict (``.safetensors``, or a torch file without pickled code), every key of which must fit.

    Raises:
        KfeError: The file cannot be read, or does not fit the module.
    """
    state = _read_state(path)
    own = module.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what} ({_first_few(keys)})" for what, keys in problems.items() if keys)
        raise KfeError(f"checkpoint {path} does not fit {type(module).__name__}: {found}")
    module.load_state_dict(state)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    torch = import_torch()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise KfeError(f"cannot read checkpoint {path}: {reason(error)}") from error
    for wrapper in ("state_dict", "model"):  # training frameworks save it so, beside the optimiser's state
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise KfeError(f"checkpoint {path} does not hold a state dict (parameter name -> tensor)")
    return state


def _first_few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Search the current folder too, which console scripts do not."""
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)
