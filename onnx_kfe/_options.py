"""The options of the command line: what several commands share in groups, and how the texts of options are read."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from onnx_kfe import calibration
from onnx_kfe._bandit_search import DEFAULT_EVALUATIONS
from onnx_kfe._finetune import DEFAULT_BATCH, DEFAULT_EPOCHS, DEFAULT_OPTIMIZER
from onnx_kfe._recipe import CURVATURES
from onnx_kfe.calibration import ImageOptions, image_preset
from onnx_kfe.errors import UsageError
from onnx_kfe.evaluation import METRICS
from onnx_kfe.graph import Network, open_network
from onnx_kfe.kfe import BASES
from onnx_kfe.pipeline import DEFAULT_SAMPLES
from onnx_kfe.planning import DEFAULT_ROUND_TO, METHODS, Budget, Latency, Macs, Milliseconds, Params
from onnx_kfe.recovery.schedules import SCHEDULES as PRUNING_SCHEDULES
from onnx_kfe.recovery.training import OPTIMIZERS, PRECISIONS, SCHEDULES

__all__ = [
    "DEFAULT_MEMORY",
    "Budgets",
    "Curvature",
    "Data",
    "Floor",
    "Heads",
    "Images",
    "Json",
    "Labels",
    "Loss",
    "Machine",
    "Memory",
    "Method",
    "Metric",
    "Model",
    "Output",
    "Providers",
    "Recovery",
    "Rounds",
    "Sampling",
    "Search",
    "Selection",
    "Taught",
    "Training",
    "flattened",
    "parse_bytes",
    "parse_shapes",
    "parse_shard",
    "required",
]

_LOSS_HELP = "ONNX graph from outputs (labels, arrays of the data) to a loss [N] in nats, in the place of the heads."
Loss = Annotated[Path | None, typer.Option("--loss", help=_LOSS_HELP)]

Model = Annotated[Path, typer.Argument(help="The .onnx file; it is never modified.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="File to write, whole or not at all.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Labels = Annotated[Path | None, typer.Option("--labels", help="CSV of file,label for a folder of images.")]
_DATA_HELP = "Inputs: image folder, .npz, .npy, test_data_set folder, or package.module:function; repeatable."
Data = Annotated[list[str] | None, typer.Option("--data", help=_DATA_HELP)]

Memory = Annotated[str, typer.Option(help="Memory for sums, activations or samples, the rest goes to disk.")]
DEFAULT_MEMORY = f"{calibration.DEFAULT_MEMORY >> 30}GB"

Providers = Annotated[list[str] | None, typer.Option(help="Execution provider, CPU by default; repeatable.")]

_SHAPE_HELP = "name:1,3,224,224 for free axes; repeatable."
_HEAD_HELP = "NAME=KIND of an output: categorical, bernoulli, gaussian, embedding (mean over positions), none."
_DROP_HELP = "Find the smallest model that is no more than this worse, instead of a budget."
_METRIC_HELP = f"What a drop is measured in: {', '.join(METRICS)}, or package.module:function."
Metric = Annotated[str | None, typer.Option("--metric", help=_METRIC_HELP)]
_ROUND_HELP = f"Ranks are multiples of this, less in small layers: {DEFAULT_ROUND_TO}, or as measured for a latency."
_KINDS: dict[str, type[Budget]] = {kind.option.removeprefix("--"): kind for kind in (Macs, Params, Latency)}
_MINIMIZE_HELP = f"What --max-drop makes small: {', '.join(_KINDS)}."
_SEARCH_HELP = f"bandit: refine the plan by measuring models, {DEFAULT_EVALUATIONS} unless --evaluations says else."
_METHOD_HELP = f"What goes: {', '.join(METHODS)}; by an importance, channels go, so that no nodes are added."
_BASIS_HELP = f"What an importance is of: {', '.join(BASES)}; channels by default."
_CHANNELS_HELP = "Remove channels first, to this share of the MACs, then choose forms."
_SCHEDULE_HELP = f"Prune while training, half of the epochs: {', '.join(PRUNING_SCHEDULES)}."
_FINETUNE_HELP = "Epochs of training, from the original on the data (extra: train); over all iterations together."
_CURVATURE_HELP = f"{' or '.join(CURVATURES)}: ekfac measures variances in the eigenbases, in a second pass."
Curvature = Annotated[str, typer.Option("--curvature", help=_CURVATURE_HELP)]
_OPTIMIZER_HELP = f"One of {', '.join(OPTIMIZERS)}."
_RATE_HELP = f"Peak of the learning rate: {', '.join(f'{rate:g} for {name}' for name, rate in OPTIMIZERS.items())}."
_PRECISION_HELP = f"One of {', '.join(PRECISIONS)}; the latter by default where the device has it."
_INTERMEDIATE_HELP = "Value within both models to be met as well, several by repeating it; auto: residual sums."
_SHARE_HELP = "Share of the loss that is on labels: none with --teacher, else all."
_AUGMENT_HELP = "Flip and shift at random; images by default."
_PRESET_HELP = "Image preprocessing by name, e.g. imagenet, unit, raw."


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which layers, at which shapes."""

    input_shape: Annotated[list[str] | None, typer.Option("--input-shape", help=_SHAPE_HELP)] = None
    include: Annotated[list[str] | None, typer.Option("--include", help="Only layers of this name (glob).")] = None
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="No layers of this name (glob).")] = None

    def open(self, model: Path) -> Network:
        """Open a model with these layers selected."""
        shapes = parse_shapes(self.input_shape)
        return open_network(model, input_shapes=shapes, include=self.include or (), exclude=self.exclude or ())


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What the result may cost."""

    macs: Annotated[float | None, typer.Option("--macs", help="MACs to keep: a fraction, or a number.")] = None
    params: Annotated[float | None, typer.Option("--params", help="Parameters to keep: a fraction or number.")] = None
    latency: Annotated[float | None, typer.Option("--latency", help="Fraction of the latency to keep.")] = None
    latency_ms: Annotated[float | None, typer.Option("--latency-ms", help="Latency in milliseconds.")] = None
    batch: Annotated[int, typer.Option(min=1, help="Samples of a run whose latency counts.")] = 1
    round_to: Annotated[int | None, typer.Option(min=1, help=_ROUND_HELP)] = None

    @property
    def given(self) -> list[Budget]:
        """The budgets that were given."""
        amounts: tuple[tuple[type[Budget], float | None], ...] = (
            (Macs, self.macs), (Params, self.params), (Latency, self.latency), (Milliseconds, self.latency_ms)
        )  # fmt: skip
        return [budget(amount) for budget, amount in amounts if amount is not None]


@dataclasses.dataclass(frozen=True)
class Images:
    """How images become inputs."""

    preset: Annotated[str | None, typer.Option("--preset", help=_PRESET_HELP)] = None
    mean: Annotated[str | None, typer.Option("--mean", help="Mean per channel, e.g. 0.485,0.456,0.406.")] = None
    std: Annotated[str | None, typer.Option("--std", help="Standard deviation per channel.")] = None
    size: Annotated[str | None, typer.Option("--size", help="Height,width where the model leaves them free.")] = None
    layout: Annotated[str | None, typer.Option("--layout", help="NCHW or NHWC; detected by default.")] = None

    @property
    def given(self) -> ImageOptions | None:
        """Those of the preset, each replaced by what was given beside it; None where nothing was given."""
        replaced: dict[str, Any] = {}
        if self.mean is not None:
            replaced["mean"] = _numbers("--mean", self.mean, float)
        if self.std is not None:
            replaced["std"] = _numbers("--std", self.std, float)
        if self.size is not None:
            size = _numbers("--size", self.size, int)
            replaced["size"] = size * 2 if len(size) == 1 else size
        if self.layout is not None:
            replaced["layout"] = self.layout.upper()
        if self.preset is None and not replaced:
            return None
        return dataclasses.replace(image_preset(self.preset or "imagenet"), **replaced)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What ONNX Runtime runs on."""

    providers: Providers = None
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")] = None

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        return {"providers": self.providers or (), "threads": self.threads}


@dataclasses.dataclass(frozen=True)
class Floor:
    """What the result must be worth, instead of a budget."""

    max_drop: Annotated[float | None, typer.Option("--max-drop", help=_DROP_HELP)] = None
    metric: Metric = None
    minimize: Annotated[str | None, typer.Option("--minimize", help=_MINIMIZE_HELP)] = None

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        if self.minimize is not None and self.minimize not in _KINDS:
            raise UsageError(f"--minimize {self.minimize}: it can be {', '.join(_KINDS)}")
        if self.minimize is not None and self.max_drop is None:
            raise UsageError("--minimize says what --max-drop makes small: give --max-drop too")
        return {"max_drop": self.max_drop, "metric": self.metric, "minimize": _KINDS[self.minimize or "macs"]}


@dataclasses.dataclass(frozen=True)
class Search:
    """How the plan is looked for."""

    search: Annotated[str | None, typer.Option("--search", help=_SEARCH_HELP)] = None
    evaluations: Annotated[int | None, typer.Option(min=1, help="Models that --search may measure.")] = None

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        if self.search not in (None, "bandit"):
            raise UsageError(f"--search {self.search}: it can be bandit")
        if self.search is None and self.evaluations is not None:
            raise UsageError("--evaluations is how much --search may measure: give --search bandit too")
        return {"evaluations": None if self.search is None else self.evaluations or DEFAULT_EVALUATIONS}


@dataclasses.dataclass(frozen=True)
class Method:
    """What is pruned, and by what."""

    method: Annotated[str | None, typer.Option("--method", help=_METHOD_HELP)] = None
    basis: Annotated[str | None, typer.Option("--basis", help=_BASIS_HELP)] = None
    channels: Annotated[float | None, typer.Option("--channels", help=_CHANNELS_HELP)] = None

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How often statistics are collected, and of what."""

    iterations: Annotated[int, typer.Option(min=1, help="Rounds, with statistics collected anew in each.")] = 1
    curvature: Curvature = "kfac"

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How what was lost is taken back."""

    no_refit: Annotated[bool, typer.Option("--no-refit", help="Do not solve the layers anew on the samples.")] = False
    memory: Memory = DEFAULT_MEMORY

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        return {"refit": not self.no_refit, "memory": parse_bytes(self.memory)}


@dataclasses.dataclass(frozen=True)
class Taught:
    """How pruning and training go together."""

    schedule: Annotated[str | None, typer.Option("--schedule", help=_SCHEDULE_HELP)] = None
    finetune: Annotated[int, typer.Option("--finetune", min=0, help=_FINETUNE_HELP)] = 0

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        return {"schedule": self.schedule, "epochs": self.finetune}


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained."""

    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = DEFAULT_EPOCHS
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = DEFAULT_BATCH
    optimizer: Annotated[str, typer.Option(help=_OPTIMIZER_HELP)] = DEFAULT_OPTIMIZER
    learning_rate: Annotated[float | None, typer.Option(help=_RATE_HELP)] = None
    schedule: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULES)}.")] = "one-cycle"
    temperature: Annotated[float, typer.Option(help="Softens what is learnt from the teacher.")] = 4.0
    intermediate: Annotated[list[str] | None, typer.Option("--intermediate", help=_INTERMEDIATE_HELP)] = None
    label_share: Annotated[float | None, typer.Option("--label-share", help=_SHARE_HELP)] = None
    augment: Annotated[bool | None, typer.Option("--augment/--no-augment", help=_AUGMENT_HELP)] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of order and augmentation.")] = 0
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA by default where there is some.")] = None
    precision: Annotated[str | None, typer.Option(help=_PRECISION_HELP)] = None
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; as torch takes by default.")] = None

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        return {**dataclasses.asdict(self), "intermediate": self.intermediate or ()}


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the outputs mean."""

    head: Annotated[list[str] | None, typer.Option("--head", help=_HEAD_HELP)] = None

    @property
    def given(self) -> dict[str, str]:
        """Kind by output name."""
        pairs = [(text, *text.rpartition("=")[::2]) for text in self.head or ()]
        if bad := next((text for text, name, kind in pairs if not (name and kind)), None):
            raise UsageError(f"--head {bad}: write NAME=KIND")
        return {name: kind for _, name, kind in pairs}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is drawn: samples of the data, targets and positions."""

    max_samples: Annotated[int, typer.Option(min=2, help="Use at most this many samples.")] = DEFAULT_SAMPLES
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and positions.")] = 0

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments of the API."""
        return dataclasses.asdict(self)


def flattened(function: Callable[..., None]) -> Callable[..., None]:
    """Give a function the fields of the groups that it takes as its own parameters, as typer wants them."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if group := groups.get(parameter.name):
            types = get_type_hints(group, include_extras=True)
            parameters += [
                parameter.replace(name=field.name, default=field.default, annotation=types[field.name])
                for field in dataclasses.fields(group)
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def required(data: list[str] | None) -> list[str]:
    """The data that a command cannot do without."""
    if not data:
        raise UsageError("give --data: an image folder, .npz, .npy, test_data_set folder, or package.module:function")
    return data


def parse_shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Read ``name:1,3,224,224`` options: shape by input name."""
    shapes = {}
    for text in texts or ():
        name, _, sizes = text.rpartition(":")
        if not name or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes.split(",")):
            raise UsageError(f"--input-shape {text}: write name:1,3,224,224")
        shapes[name] = tuple(int(size) for size in sizes.split(","))
    return shapes


def parse_bytes(text: str) -> int:
    """Read ``4GB``, ``500MB`` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory {text}: write a size such as 4GB or 500MB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``i/n``."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard {text}: write i/n with i from 0 to n - 1")
    return int(index), int(count)


def _numbers(option: str, text: str, kind: type[float] | type[int]) -> tuple[float, ...]:
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: write numbers with commas between") from None
