"""Idle threads of OpenBLAS sleep at once: NumPy's copy, SciPy's and ONNX Runtime take turns on the same cores.

Each copy reads the setting when it is loaded: a program that imports NumPy before this package sets it by itself.
"""

import os

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # log2 of clock cycles; read when the library is loaded
