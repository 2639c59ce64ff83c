"""The command line: parse, call the API, print. A command is a function; those of a kind are in one module."""

from onnx_kfe.cli import _look, _shrink  # isort: skip - commands are listed in this order
from onnx_kfe.cli import _judge, _start  # isort: skip
from onnx_kfe.cli._app import app, main

__all__ = ["app", "main"]

# Imported for the commands they register.
del _judge, _look, _shrink, _start
