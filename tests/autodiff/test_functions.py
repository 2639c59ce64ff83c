import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onnx_kfe.autodiff import sizes_of
from tests.autodiff.graphs import assert_gradients, build, differentiate, normal, operators

SHAPES = {name: ["N", 4, "T", 8] for name in "qkv"}


def tensors(heads: int = 4) -> dict[str, np.ndarray]:
    return {"q": normal(2, 4, 5, 8), "k": normal(2, heads, 5, 8, seed=1), "v": normal(2, heads, 5, 8, seed=2)}


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(causal, dynamic, opset):
    assert_gradients(
        [("Attention", "q k v", "y", {"is_causal": causal})],
        tensors(),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal)),
        shapes=SHAPES if dynamic else None,
        opset=opset,
    )


def test_attention_of_a_value_to_itself():
    assert_gradients(
        [("Attention", "x x x", "y", {"scale": 0.3})],
        {"x": normal(2, 4, 5, 8)},
        lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
        opset=23,
    )


def test_attention_of_groups_with_a_mask():
    mask = normal(5, 5, seed=3)
    mask[:, 3:] = -np.inf
    assert_gradients(
        [("Attention", "q k v m", "y", {})],
        tensors(2),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.tensor(mask), enable_gqa=True),
        constants={"m": mask},
        opset=23,
    )


def test_attention_with_heads_in_the_last_axis():
    def function(q, k, v):
        apart = (x.unflatten(-1, (4, 2)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2)

    assert_gradients(
        [("Attention", "q k v", "y", {"q_num_heads": 4, "kv_num_heads": 4})],
        {name: normal(2, 5, 8, seed=seed) for seed, name in enumerate("qkv")},
        function,
        opset=23,
    )


def test_the_fused_forward_node_stays():
    model = build([("Attention", "q k v", "y", {})], tensors(), opset=23)
    differentiate(model, ["v"])
    assert next(iter(model.graph)).op_type == "Attention"
    assert "Attention" not in operators(model)


def test_rotary_embedding():
    angle = normal(3, 4)
    caches = {"c": np.cos(angle), "s": np.sin(angle)}

    def function(x):
        cosine, sine = (torch.tensor(table) for table in caches.values())
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)

    positions = np.array([[0, 1, 2], [0, 1, 2]])
    assert_gradients(
        [("RotaryEmbedding", "x c s p", "y", {})],
        {"x": normal(2, 2, 3, 8)},
        function,
        constants={**caches, "p": positions},
        opset=23,
    )


def test_a_definition_by_another_defined_operator():
    """The cross-entropy stands for a LogSoftmax and the NegativeLogLikelihoodLoss, which stands for a gather."""
    labels = np.array([0, 3, 2])
    assert_gradients(
        [("SoftmaxCrossEntropyLoss", "x l", "y", {})],
        {"x": normal(3, 4)},
        lambda x: F.cross_entropy(x, torch.tensor(labels)),
        constants={"l": labels},
    )


def test_an_operator_without_a_definition_is_blocked():
    model = build([("Det", "x", "y", {})], {"x": normal(3, 3)})
    assert differentiate(model, ["x"]).blocked.popitem()[1] == "no gradient rule for Det (node 'Det0')"


def test_a_definition_that_cannot_be_had_blocks(monkeypatch):
    def refuse(model):
        raise RuntimeError

    monkeypatch.setattr("onnx.inliner.inline_local_functions", refuse)
    model = build([("Attention", "q k v", "y", {})], tensors(), opset=23)
    reasons = set(differentiate(model, ["q"]).blocked.values())
    assert reasons == {"no gradient rule for Attention (node 'Attention0')"}


def test_sizes_of_definitions_have_names_of_their_own():
    """Two definitions, of inputs with sizes of the same names: none of the inner sizes is taken for another's."""
    nodes = [("Attention", "x x x", "h", {}), ("Relu", "h", "r", {}), ("Attention", "r x x", "y", {})]
    model = build(nodes, {"x": normal(2, 4, 5, 8)}, shapes={"x": ["N", 4, "T", 8]}, opset=23)
    outer = {size for node in model.graph for value in node.outputs for size in sizes_of(value) or ()}
    differentiate(model, ["x"])
    sizes = {size for node in model.graph for value in node.outputs for size in sizes_of(value) or ()}
    inner = {size for size in sizes - outer if isinstance(size, str)}
    assert inner
    assert {size.partition("/")[0] for size in inner} <= {"h", "y"}
