"""Calibration: data readers, heads, the instrumented graph, collection and the statistics container."""

from onnx_kfe.calibration._batches import Batch, Batches, batches
from onnx_kfe.calibration._collect import DEFAULT_MEMORY, collect
from onnx_kfe.calibration._data import Dataset, DataSource, Item, open_dataset
from onnx_kfe.calibration._eigen_moments import collect_eigen_moments
from onnx_kfe.calibration._heads import HEAD_KINDS, Head, detect_heads, sample_noise
from onnx_kfe.calibration._images import ImageOptions, image_preset
from onnx_kfe.calibration._inputs import InputSpec, Sample, fixed_batch
from onnx_kfe.calibration._instrument import differentiable_copy, find_heads
from onnx_kfe.calibration._layer_statistics import LayerStatistics, PositionMeans
from onnx_kfe.calibration._passes import batch_size, input_specs
from onnx_kfe.calibration._patches import channel_major, emit_samples, features_last
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
    "PositionMeans",
    "Sample",
    "Statistics",
    "batch_size",
    "batches",
    "channel_major",
    "collect",
    "collect_eigen_moments",
    "detect_heads",
    "differentiable_copy",
    "emit_samples",
    "features_last",
    "find_heads",
    "fixed_batch",
    "image_preset",
    "input_specs",
    "merge",
    "open_dataset",
    "sample_noise",
    "synthetic_dataset",
]
