"""Export a pretrained model of timm, torchvision or transformers to ONNX, ready for ``onnx-kfe prune``.

    python tools/export_model.py timm resnet18.a1_in1k -o resnet18.onnx
    python tools/export_model.py torchvision mobilenet_v2 -o mobilenet_v2.onnx
    python tools/export_model.py transformers distilbert/distilbert-base-uncased-finetuned-sst-2-english -o sst2.onnx

The batch is dynamic, and so is the length of a text. The input preprocessing that the model expects is printed.
Needs ``pip install 'onnx-kfe[cpu,train]'`` and the collection's own package. torchvision's classifiers only; a name for
transformers is one of its hub's, or a local folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from onnx_kfe.errors import KfeError
from onnx_kfe.exporting import export


@dataclass(frozen=True)
class Source:
    """A pretrained module with what exporting it takes."""

    module: nn.Module
    inputs: tuple[Tensor, ...] | Mapping[str, Tensor]
    output_names: list[str] | None = None  # None: those of the mapping that the module returns
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    preprocessing: str = ""


def classifier(module: nn.Module, size: tuple[int, ...], mean: object, std: object) -> Source:
    """A source whose forward takes one image tensor and returns logits."""
    return Source(module, (torch.randn(2, *size),), ["logits"], preprocessing=f"{size=} {mean=} {std=}")


def from_timm(name: str) -> Source:
    import timm

    module = timm.create_model(name, pretrained=True, exportable=True)
    config = timm.data.resolve_model_data_config(module)
    return classifier(module, config["input_size"], config["mean"], config["std"])


def from_torchvision(name: str) -> Source:
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    transform = weights.transforms()
    (side,) = transform.crop_size
    return classifier(models.get_model(name, weights=weights), (3, side, side), transform.mean, transform.std)


def from_transformers(name: str) -> Source:
    import transformers

    architecture = transformers.AutoConfig.from_pretrained(name).architectures[0]
    # Attention as plain operators, which have gradients and can be pruned.
    module = getattr(transformers, architecture).from_pretrained(name, attn_implementation="eager")
    module.config.use_cache = False
    if module.main_input_name == "pixel_values":
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        side = module.config.image_size
        pixels = torch.randn(2, getattr(module.config, "num_channels", 3), side, side)
        return Source(module, {"pixel_values": pixels}, preprocessing=str(processor))
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    inputs = dict(tokenizer(["an example of eight or so tokens"] * 2, return_tensors="pt"))
    dynamic = {key: {0: "batch", 1: "length"} for key in inputs}
    return Source(module, inputs, dynamic=dynamic, preprocessing=f"tokens of {name}")


COLLECTIONS: dict[str, Callable[[str], Source]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "transformers": from_transformers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", choices=COLLECTIONS)
    parser.add_argument("name", help="the model's name in its collection")
    parser.add_argument("-o", "--output", required=True, help="the ONNX file to write")
    parser.add_argument("--opset", type=int, help="ONNX operator set, from 18 on (default: the exporter's choice)")
    arguments = parser.parse_args()

    if find_spec(arguments.collection) is None:
        sys.exit(f"{arguments.collection} is not installed: pip install {arguments.collection}")
    source = COLLECTIONS[arguments.collection](arguments.name)
    try:
        export(
            source.module,
            source.inputs,
            arguments.output,
            opset=arguments.opset,
            dynamic=source.dynamic,
            output_names=source.output_names,
        )
    except KfeError as error:
        sys.exit(str(error))
    print(f"wrote {arguments.output}; inputs: {source.preprocessing}")


if __name__ == "__main__":
    main()
