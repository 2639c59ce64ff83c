"""The forms that there are. One class, one registration."""

from __future__ import annotations

from onnx_kfe.planning._direction_forms import DIRECTION_FORMS
from onnx_kfe.planning._form import Form
from onnx_kfe.planning._low_rank_forms import InputLowRank, OutputLowRank, Spatial, TuckerChain
from onnx_kfe.planning._structured_forms import BlockDiagonal, DepthwiseSeparable

__all__ = ["FORMS"]

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        OutputLowRank("two_factor", pointwise=True),
        OutputLowRank("output_low_rank", pointwise=False),
        InputLowRank(),
        TuckerChain(),
        Spatial(),
        DepthwiseSeparable(),
        BlockDiagonal(),
        *DIRECTION_FORMS.values(),
    )
}
