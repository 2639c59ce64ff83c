"""``python -m onnx_kfe``."""

import sys

from onnx_kfe.cli import main

sys.exit(main())
