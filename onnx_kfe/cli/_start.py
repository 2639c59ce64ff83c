"""Commands to start with: export, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import onnx_kfe as kfe
from onnx_kfe import _options as options
from onnx_kfe import console
from onnx_kfe.cli._app import command
from onnx_kfe.cli._shrink import save_result
from onnx_kfe.graph import check_output
from onnx_kfe.planning import Macs

__all__: list[str] = []

_DEMO_BUDGET = 0.5


@command
def export(
    *,
    factory: Annotated[str, typer.Argument(help="package.module:function that returns a torch module.")],
    output: options.Output,
    input_shape: Annotated[list[str], typer.Option(help="x:1,3,224,224 or ids:int64:1,128; repeatable.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: .safetensors, or a torch state dict.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; torch's own choice by default.")] = None,
    dynamic: Annotated[list[str] | None, typer.Option(help="x:0=batch for each open axis, or none.")] = None,
    json: options.Json = False,
) -> None:
    """Export a torch module to ONNX and compare it with torch (needs the extra: train)."""
    from onnx_kfe.exporting import export_factory, parse_dynamic, parse_input_shape

    check_output(output)
    inputs = [parse_input_shape(text) for text in input_shape]
    with console.ShownProgress().stage("exporting"):
        export_factory(factory, output, inputs, checkpoint, opset, parse_dynamic(dynamic or []))
        network = kfe.inspect(output)
    if json:
        console.print_json({"output": str(output), "layers": len(network.owners), "prunable": len(network.prunable)})
    else:
        console.print_line(f"{len(network.prunable)} of {len(network.owners)} layers can be pruned")
        console.print_line(f"written, and equal to torch: {output}")


@command
def demo(
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("digits-small.onnx"),
    macs: Annotated[float, typer.Option("--macs", help="MACs to keep.")] = _DEMO_BUDGET,
    machine: options.Machine,
    json: options.Json = False,
) -> None:
    """Prune a bundled classifier of handwritten digits and measure what it cost."""
    from onnx_kfe import demo as bundle

    check_output(output, bundle.model_path())
    images, _ = bundle.load_digits_split("calibration")
    test, labels = bundle.load_digits_split("test")
    result = kfe.prune(
        bundle.model_path(),
        {"image": images},
        Macs(macs),
        evaluation_data={"image": test, "labels": labels},
        progress=console.ShownProgress(),
        **machine.given,
    )
    save_result(result, output, json)
