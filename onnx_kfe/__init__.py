"""Make a trained ONNX model smaller and measurably faster, from the .onnx file and some inputs alone."""

__version__ = "0.1.0"
