"""The forms that there are. One class, one registration."""

from __future__ import annotations

from onnx_kfe.planning._direction_forms import DIRECTION_FORMS
from onnx_kfe.planning._form import Form
from onnx_kfe.planning._low_rank_forms import InputLowRank, OutputLowRank, Spatial, TuckerChain
from onnx_kfe.planning._structured_forms import BlockDiagonal, DepthwiseSeparable
from onnx_kfe.planning._two_way_forms import TwoWay

__all__ = ["FORMS"]

_OUTPUT, _INPUT = OutputLowRank("output_low_rank", pointwise=False), InputLowRank()

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        TwoWay(OutputLowRank("two_factor", pointwise=True)),
        TwoWay(_OUTPUT, _INPUT),
        TwoWay(_INPUT, _OUTPUT),
        TwoWay(TuckerChain()),
        TwoWay(Spatial()),
        TwoWay(DepthwiseSeparable()),
        BlockDiagonal(),
        *DIRECTION_FORMS.values(),
    )
}
