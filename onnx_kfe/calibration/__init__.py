"""Calibration: data readers, heads, the instrumented graph, collection and the statistics container."""

from onnx_kfe.calibration._batches import Batch, Batches, batches
from onnx_kfe.calibration._collect import DEFAULT_MEMORY, collect
from onnx_kfe.calibration._data import Dataset, DataSource, Item, open_dataset
from onnx_kfe.calibration._eigen_moments import collect_eigen_moments
from onnx_kfe.calibration._grid import grid_phase
from onnx_kfe.calibration._heads import HEAD_KINDS, Head, detect_heads, emit_source, sample_noise
from onnx_kfe.calibration._images import ImageOptions, image_preset
from onnx_kfe.calibration._inputs import InputSpec, Sample, fixed_batch
from onnx_kfe.calibration._instrument import differentiable_copy, find_heads
from onnx_kfe.calibration._layer_statistics import LayerStatistics, PositionMeans
from onnx_kfe.calibration._loss import Loss
from onnx_kfe.calibration._moments import emit_samples
from onnx_kfe.calibration._open_loss import open_loss
from onnx_kfe.calibration._padding import find_padding
from onnx_kfe.calibration._passes import batch_size, data_specs, input_specs
from onnx_kfe.calibration._patches import channel_major, features_last
from onnx_kfe.calibration._readers_streams import import_function, is_function_name
from onnx_kfe.calibration._statistics import Statistics, merge
from onnx_kfe.calibration._synthetic import synthetic_dataset

__all__ = [
    "DEFAULT_MEMORY",
    "HEAD_KINDS",
    "Batch",
    "Batches",
    "DataSource",
    "Dataset",
    "Head",
    "ImageOptions",
    "InputSpec",
    "Item",
    "LayerStatistics",
    "Loss",
    "PositionMeans",
    "Sample",
    "Statistics",
    "batch_size",
    "batches",
    "channel_major",
    "collect",
    "collect_eigen_moments",
    "data_specs",
    "detect_heads",
    "differentiable_copy",
    "emit_samples",
    "emit_source",
    "features_last",
    "find_heads",
    "find_padding",
    "fixed_batch",
    "grid_phase",
    "image_preset",
    "import_function",
    "input_specs",
    "is_function_name",
    "merge",
    "open_dataset",
    "open_loss",
    "sample_noise",
    "synthetic_dataset",
]
