"""The torch module of a graph: its constants under their own names, and the program that onnx2fx makes of its nodes."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["OnnxModule", "module_keys"]


class OnnxModule(nn.Module):
    """A graph as a module.

    Attributes:
        input_names: Inputs of the graph.
        output_names: Outputs of the graph.
        initializer_names: Name in the graph of what was learnt, by its key in ``state_dict()``.
        program: The function that runs the nodes, from the module and the inputs.
    """

    program: Callable[..., Any]

    def __init__(self, input_names: list[str], output_names: list[str], initializer_names: dict[str, str]) -> None:
        super().__init__()
        self.input_names = input_names
        self.output_names = output_names
        self.initializer_names = initializer_names

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
        return self.program(self, *inputs, *(named[name] for name in rest))

    def place(self, key: str, part: Tensor | nn.Module, *, fixed: bool = False) -> None:
        """Register a part of the module.

        Args:
            key: Where; dots make modules in between.
            part: A parameter, a module, or a tensor as a buffer, saved if it was learnt.
            fixed: Whether it is a tensor that keeps its type and device instead.
        """
        *path, leaf = key.split(".")
        owner: nn.Module = self
        for atom in path:
            if not hasattr(owner, atom):
                owner.add_module(atom, nn.Module())
            owner = getattr(owner, atom)
        if fixed or isinstance(part, nn.Module | nn.Parameter):
            setattr(owner, leaf, part)
        else:
            owner.register_buffer(leaf, part, persistent=key in self.initializer_names)


def module_keys(names: Sequence[str]) -> list[str]:
    """Keys that the parts of a module can have, all different: their names in the graph where possible.

    Torch takes a dot for the step into a submodule, so no part between dots may be empty, stand for an attribute that
    modules have, or be a module here and a tensor there. What runs the graph is Python code, with its keywords.
    """
    wanted = [".".join(_atom(part) for part in name.split(".")) for name in names]
    modules = {key[:end] for key in wanted for end, letter in enumerate(key) if letter == "."}
    unchanged = {key for key, name in zip(wanted, names, strict=True) if key == name}
    keys: list[str] = []
    taken = set(modules)
    for key, name in zip(wanted, names, strict=True):
        while key in taken or (key in unchanged and key != name):
            key += "_"
        keys.append(key)
        taken.add(key)
    return keys


def _atom(part: str) -> str:
    """A part of a name as an attribute of a module."""
    part = re.sub(r'["\\\r\n]', "_", part) or "_"
    return f"{part}_" if part in _RESERVED or keyword.iskeyword(part) else part


_RESERVED = frozenset({*dir(OnnxModule([], [], {})), "program"})
