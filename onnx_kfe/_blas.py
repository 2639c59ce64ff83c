"""Idle threads of OpenBLAS sleep at once: NumPy's copy, SciPy's and ONNX Runtime take turns on the same cores."""

import os

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # log2 of clock cycles; read when the library is loaded
