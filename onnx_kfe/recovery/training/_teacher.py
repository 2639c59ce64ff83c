"""The teacher: the outputs of a model that stays as it is, on whatever the student is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnx_kfe.calibration import Sample
from onnx_kfe.evaluation import HeadSpec
from onnx_kfe.graph import serialize
from onnx_kfe.runtime import create_session

__all__ = ["Teacher", "with_scales"]
