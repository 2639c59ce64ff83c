"""The torch module of a graph: its constants under their own names, and the program that onnx2fx makes of its nodes."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["OnnxModule", "module_keys"]


class OnnxModule(nn.Module):
    """A graph as a module.

    Attributes:
        input_names: Inputs of the graph.
        output_names: Outputs of the graph.
        initializer_names: Name in the graph of what was learnt, by its key in ``state_dict()``.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        input_names: Iterable[str] = (),
        output_names: Iterable[str] = (),
        initializer_names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self.initializer_names = dict(initializer_names or {})
        self._program = program

    def forward(self, /, *inputs: Tensor, **named: Tensor) -> Any:
        """Run the graph.

        Args:
            *inputs: Inputs in the order of the graph.
            **named: Further inputs by name.

        Returns:
            The output, or a tuple where there are several.

        Raises:
            TypeError: An input is missing, unknown or given twice.
        """
        rest = self.input_names[len(inputs) :]
        if len(inputs) > len(self.input_names) or set(rest) != set(named):
            given = ", ".join([f"{len(inputs)} by position", *named])
            raise TypeError(f"the inputs are {', '.join(self.input_names)}, but given were {given}")
        return self._program(self, *inputs, *(named[name] for name in rest))

    def place(self, key: str, part: Tensor | nn.Module) -> None:
        """Register a parameter, a module, or a tensor as a buffer; dots in the key make modules in between."""
        *path, leaf = key.split(".")
        owner: nn.Module = self
        for atom in path:
            if not hasattr(owner, atom):
                owner.add_module(atom, nn.Module())
            owner = getattr(owner, atom)
        if isinstance(part, nn.Module):
            owner.add_module(leaf, part)
        elif isinstance(part, nn.Parameter):
            owner.register_parameter(leaf, part)
        else:
            owner.register_buffer(leaf, part, persistent=".".join([*path, leaf]) in self.initializer_names)


def module_keys(names: Iterable[str]) -> dict[str, str]:
    """Keys that parameters, buffers and modules of a module can have, by their names in a graph: the same if possible.

    Torch takes a dot for the step into a submodule, so no part between dots may be empty, stand for an attribute that
    modules have, or be a module here and a tensor there. What runs the graph is Python code, with its keywords.
    """
    wanted = {name: ".".join(_atom(part) for part in name.split(".")) for name in names}
    modules = {key[:end] for key in wanted.values() for end, letter in enumerate(key) if letter == "."}
    keys: dict[str, str] = {}
    taken = modules | {key for name, key in wanted.items() if key == name}
    for name, key in wanted.items():
        if key != name or key in modules:
            while key in taken:
                key += "_"
        taken.add(key)
        keys[name] = key
    return keys


def _atom(part: str) -> str:
    """A part of a name as an attribute of a module."""
    part = re.sub(r"[\"'\\\s{}]", "_", part) or "_"
    return f"{part}_" if part in _RESERVED or keyword.iskeyword(part) else part


_RESERVED = frozenset(dir(OnnxModule(lambda: None)))
