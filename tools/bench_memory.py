"""Peak memory of collecting statistics for a Transformer encoder of some size, with random weights.

    python -m tools.bench_memory --threads 1                         # 100 million parameters
    python -m tools.bench_memory --memory 1GB --sentences 12

Each measurement runs in a process of its own: the forward pass of the model over random sentences, and ``collect`` over
the same. The peak counts mapped pages of files as well, which the system takes back where memory is short. Times are of
batches after the first, and of the processor, so that they tell something on a machine shared with others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnx_kfe as kfe
from onnx_kfe import calibration
from onnx_kfe._options import DEFAULT_MEMORY, parse_bytes
from onnx_kfe.calibration import input_specs, open_dataset
from onnx_kfe.evaluation._child import peak_memory
from onnx_kfe.runtime import create_session, default_threads

CLASSES = 32
BATCH = 2  # of the forward pass; collection takes as many as its budget of activations allows
TARGET = 8 * 2**30  # bytes, at 100 million parameters


def encoder(path: Path, layers: int, width: int, inner: int, heads: int, vocabulary: int, tokens: int) -> int:
    """Write a pre-norm encoder that classifies sentences, with random weights as external data.

    Returns:
        Number of parameters.
    """
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(array, name))
        return name

    def op(kind: str, name: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def table(name: str, *shape: int) -> str:
        return constant(name, random.standard_normal(shape, np.float32))

    def linear(name: str, x: str, inputs: int, outputs: int) -> str:
        weight = random.standard_normal((inputs, outputs), np.float32) / np.float32(np.sqrt(inputs))
        product = op("MatMul", name, x, constant(f"{name}.weight", weight))
        return op("Add", f"{name}.out", product, constant(f"{name}.bias", np.zeros(outputs, np.float32)))

    def norm(name: str, x: str) -> str:
        scale = constant(f"{name}.scale", np.ones(width, np.float32))
        return op("LayerNormalization", name, x, scale, constant(f"{name}.bias", np.zeros(width, np.float32)))

    def attention(name: str, x: str) -> str:
        def split(part: str, order: tuple[int, ...]) -> str:
            whole = op("Reshape", f"{name}.{part}.split", linear(f"{name}.{part}", x, width, width), "split")
            return op("Transpose", f"{name}.{part}.heads", whole, perm=order)

        query, key, value = split("query", (0, 2, 1, 3)), split("key", (0, 2, 3, 1)), split("value", (0, 2, 1, 3))
        scores = op("Mul", f"{name}.scaled", op("MatMul", f"{name}.scores", query, key), "scale")
        mixed = op("MatMul", f"{name}.mixed", op("Softmax", f"{name}.shares", scores), value)
        together = op("Reshape", f"{name}.joined", op("Transpose", f"{name}.back", mixed, perm=(0, 2, 1, 3)), "join")
        return linear(f"{name}.output", together, width, width)

    constant("split", np.array([0, 0, heads, width // heads]))
    constant("join", np.array([0, 0, width]))
    constant("scale", np.array((width / heads) ** -0.5, np.float32))
    x = op("Gather", "words", table("embedding", vocabulary, width), "tokens")
    x = op("Add", "embedded", x, table("positions", tokens, width))
    for number in range(layers):
        name = f"layer{number}"
        x = op("Add", f"{name}.middle", x, attention(f"{name}.attention", norm(f"{name}.norm1", x)))
        hidden = op("Gelu", f"{name}.gelu", linear(f"{name}.up", norm(f"{name}.norm2", x), width, inner))
        x = op("Add", f"{name}.end", x, linear(f"{name}.down", hidden, inner, width))
    pooled = op("ReduceMean", "pooled", norm("norm", x), constant("axis", np.array([1])), keepdims=0)
    op("Softmax", "classes", linear("classifier", pooled, width, CLASSES))
    graph = helper.make_graph(
        nodes, "encoder", [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", tokens])],
        [helper.make_tensor_value_info("classes", TensorProto.FLOAT, ["n", CLASSES])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return sum(int(np.prod(tensor.dims)) for tensor in weights)


def forward(path: Path, sentences: np.ndarray, threads: int, memory: int) -> tuple[float, int]:
    """CPU seconds of the forward pass, a few sentences at a time, and peak resident bytes of this process."""
    session = create_session(path, threads=threads)
    session.run(None, {"tokens": sentences[:BATCH]})
    start = time.process_time()
    for place in range(0, len(sentences), BATCH):
        session.run(None, {"tokens": sentences[place : place + BATCH]})
    return time.process_time() - start, peak_memory() or 0


def collect(path: Path, sentences: np.ndarray, threads: int, memory: int) -> tuple[float, int]:
    """CPU seconds of all batches, and peak resident bytes of this process up to the file of statistics."""
    network = kfe.inspect(path)
    data = open_dataset({"tokens": sentences}, input_specs(network.model))
    marks: list[float] = []
    found = calibration.collect(
        network, data, threads=threads, memory=memory, progress=lambda samples: marks.append(time.process_time())
    )
    assert not found.skipped
    found.save(path.with_name("statistics.safetensors"))
    return (marks[-1] - marks[0]) * len(marks) / (len(marks) - 1), peak_memory() or 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--inner", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=19_500)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=24)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--memory", default=DEFAULT_MEMORY, help="as of onnx-kfe collect")
    given = parser.parse_args()

    sentences = np.random.default_rng(1).integers(0, given.vocabulary, (given.sentences, given.tokens))
    with tempfile.TemporaryDirectory(prefix="onnx-kfe-") as folder:
        path = Path(folder) / "encoder.onnx"
        size = encoder(
            path, given.layers, given.width, given.inner, given.heads, given.vocabulary, given.tokens
        )  # fmt: skip
        print(f"{size / 1e6:.1f} million parameters, {given.sentences} sentences, target {TARGET / 2**30:.0f} GiB")
        seconds = {}
        for task in (forward, collect):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(task, path, sentences, given.threads, parse_bytes(given.memory)).result()
            seconds[task], peak = found
            print(f"{task.__name__:<10}{seconds[task]:>9.1f} CPU s{peak / 2**30:>9.2f} GiB at its peak", flush=True)
    print(f"collect / forward {seconds[collect] / seconds[forward]:.2f}")


if __name__ == "__main__":
    main()
