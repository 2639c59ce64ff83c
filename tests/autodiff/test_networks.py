"""Whole networks: a residual one and an attention block, by every value inside."""

import numpy as np
import torch
import torch.nn.functional as F

from tests.autodiff.graphs import build, differentiate, normal, run


def compare(nodes, inputs, constants, wanted, function, shapes):
    """`function(tensors) -> the named inner values`, the last of them the head `y`."""
    model = build(nodes, inputs, constants=constants, shapes=shapes)
    gradients = differentiate(model, wanted)
    assert not gradients.blocked
    inner = function(*map(torch.tensor, inputs.values()), **{n: torch.tensor(a) for n, a in constants.items()})
    seed = normal(*inner["y"].shape, seed=9)
    expected = torch.autograd.grad(inner["y"], [inner[name] for name in wanted], torch.tensor(seed))
    got = run(model, {**inputs, "dy": seed})
    for name, slope in zip(wanted, expected, strict=True):
        np.testing.assert_allclose(got[f"d({name})"], slope.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_residual_network():
    same = {"pads": [1, 1, 1, 1]}
    nodes = [
        ("Conv", "x w0 b0", "c0", {**same}),
        ("Relu", "c0", "r0", {}),
        ("Conv", "r0 w1 b1", "c1", {**same, "strides": [2, 2]}),
        ("BatchNormalization", "c1 g1 h1 m1 v1", "n1", {}),
        ("Clip", "n1 low high", "r1", {}),
        ("Conv", "r1 w2 b2", "c2", {**same, "group": 4}),
        ("Slice", "r0 starts ends axes steps", "half", {}),
        ("Pad", "half pads", "wide", {}),
        ("Add", "c2 wide", "s", {}),
        ("Relu", "s", "r2", {}),
        ("MaxPool", "r2", "p", {"kernel_shape": [3, 3], "strides": [2, 2], **same}),
        ("GlobalAveragePool", "p", "a", {}),
        ("Flatten", "a", "f", {}),
        ("Gemm", "f w3 b3", "logits", {"transB": 1}),
        ("LogSoftmax", "logits", "y", {}),
    ]
    constants = {
        **{"w0": normal(8, 3, 3, 3), "b0": normal(8), "w1": normal(16, 8, 3, 3) / 5, "b1": normal(16)},
        **{"g1": normal(16), "h1": normal(16, seed=1), "m1": normal(16, seed=2), "v1": np.abs(normal(16)) + 0.5},
        **{"w2": normal(16, 4, 3, 3) / 3, "b2": normal(16), "w3": normal(5, 16), "b3": normal(5)},
        **{"low": np.float32(0), "high": np.float32(1.5), "pads": np.array([0, 4, 0, 0, 0, 4, 0, 0])},
        **{"starts": np.array([0, 0]), "ends": np.array([99, 99]), "axes": np.array([2, 3]), "steps": np.array([2, 2])},
    }

    def function(x, w0, b0, w1, b1, g1, h1, m1, v1, w2, b2, w3, b3, **_):
        v = {"x": x.requires_grad_()}
        v["c0"] = F.conv2d(x, w0, b0, padding=1)
        r0 = F.relu(v["c0"])
        v["c1"] = F.conv2d(r0, w1, b1, 2, 1)
        v["c2"] = F.conv2d(F.batch_norm(v["c1"], m1, v1, g1, h1).clamp(0, 1.5), w2, b2, padding=1, groups=4)
        v["s"] = v["c2"] + F.pad(r0[:, :, ::2, ::2], [0, 0, 0, 0, 4, 4])
        v["logits"] = F.linear(F.max_pool2d(F.relu(v["s"]), 3, 2, 1).mean((2, 3)), w3, b3)
        v["y"] = F.log_softmax(v["logits"], -1)
        return v

    wanted = ["x", "c0", "c1", "c2", "s", "logits"]
    x = {"x": normal(3, 3, 12, 12, seed=5)}
    for shapes in (None, {"x": ["N", 3, 12, 12]}, {"x": ["N", 3, "H", "W"]}):
        compare(nodes, x, constants, wanted, function, shapes)


def test_attention_block():
    nodes = [
        ("LayerNormalization", "x g b", "n", {"epsilon": 1e-5}),
        ("MatMul", "n wq", "q", {}),
        ("MatMul", "n wk", "k", {}),
        ("MatMul", "n wv", "v", {}),
        *(("Reshape", f"{name} heads", f"{name}h", {}) for name in "qkv"),
        ("Transpose", "qh", "qt", {"perm": [0, 2, 1, 3]}),
        ("Transpose", "kh", "kt", {"perm": [0, 2, 3, 1]}),
        ("Transpose", "vh", "vt", {"perm": [0, 2, 1, 3]}),
        ("MatMul", "qt kt", "scores", {}),
        ("Div", "scores root", "scaled", {}),
        ("Add", "scaled mask", "masked", {}),
        ("Softmax", "masked", "p", {"axis": -1}),
        ("MatMul", "p vt", "o", {}),
        ("Transpose", "o", "ot", {"perm": [0, 2, 1, 3]}),
        ("Reshape", "ot flat", "of", {}),
        ("MatMul", "of wo", "proj", {}),
        ("Add", "proj x", "res", {}),
        ("MatMul", "res w1", "u", {}),
        ("Gelu", "u", "act", {}),
        ("MatMul", "act w2", "d", {}),
        ("Add", "d res", "y", {}),
    ]
    names = ("wq", "wk", "wv", "wo")
    constants = {name: normal(8, 8, seed=i) / 3 for i, name in enumerate(names)}
    constants |= {"g": normal(8), "b": normal(8, seed=1), "w1": normal(8, 16) / 3, "w2": normal(16, 8, seed=4) / 3}
    constants |= {"root": np.float32(2), "heads": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 8])}
    inputs = {"x": normal(2, 5, 8, seed=6), "mask": np.where(normal(2, 1, 1, 5) > 1, -1e4, 0).astype(np.float32)}

    def function(x, mask, wq, wk, wv, wo, g, b, w1, w2, **_):
        v = {"x": x.requires_grad_()}
        n = F.layer_norm(x, (8,), g, b)
        v["q"], v["k"], v["v"] = n @ wq, n @ wk, n @ wv
        q, k, u = (v[name].reshape(2, 5, 2, 4).transpose(1, 2) for name in "qkv")
        v["scores"] = q @ k.transpose(-1, -2)
        v["o"] = torch.softmax(v["scores"] / 2 + mask, -1) @ u
        v["proj"] = v["o"].transpose(1, 2).reshape(2, 5, 8) @ wo
        residual = v["proj"] + x
        v["u"] = residual @ w1
        v["d"] = F.gelu(v["u"]) @ w2
        v["y"] = v["d"] + residual
        return v

    wanted = ["x", "q", "k", "v", "scores", "o", "proj", "u", "d"]
    for shapes in (None, {"x": ["N", "T", 8], "mask": ["N", 1, 1, "T"]}):
        compare(nodes, inputs, constants, wanted, function, shapes)
