"""Padding weighs nothing: padded batches give what the sentences give one by one, and embeddings are their means."""

import numpy as np
import pytest
import torch
from onnx import numpy_helper, parser

import onnx_kfe as kfe
from onnx_kfe.calibration import (
    Head,
    Statistics,
    _moments,
    collect,
    collect_eigen_moments,
    find_padding,
    open_dataset,
    sample_noise,
)
from onnx_kfe.calibration import input_specs as specs_of
from onnx_kfe.graph import Network, open_network, serialize
from onnx_kfe.runtime import create_session

WIDTH = 6
LENGTHS = (5, 2, 7, 3, 6, 4, 1, 7)
LONGEST = max(LENGTHS)
RANDOM = np.random.default_rng(0)
SENTENCES = [RANDOM.standard_normal((1, length, WIDTH)).astype(np.float32) for length in LENGTHS]

ENCODER = """
    real = Cast<to = 1>(attention_mask)
    off = Sub(one, real)
    far = Mul(off, minus)
    addend = Unsqueeze(far, middle)
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    kt = Transpose<perm = [0, 2, 1]>(k)
    scores = MatMul(q, kt)
    masked = Add(scores, addend)
    p = Softmax<axis = -1>(masked)
    mixed = MatMul(p, v)
    o = MatMul(mixed, wo)
    s = Add(o, x)
    h = MatMul(s, w1)
    r = Relu(h)
    y = MatMul(r, w2)
"""


def encoder(batch: str = "N", sequence: str = "T", mask: str = "attention_mask") -> Network:
    """One block of attention and feed-forward on given embeddings."""
    sizes = {"wq": (6, 6), "wk": (6, 6), "wv": (6, 6), "wo": (6, 6), "w1": (6, 12), "w2": (12, 6)}
    random = np.random.default_rng(1)
    constants = {name: random.standard_normal(shape).astype(np.float32) / 2 for name, shape in sizes.items()}
    constants |= {"one": np.float32(1), "minus": np.float32(-1e4), "middle": np.array([1])}
    text = ENCODER.replace("attention_mask", mask)
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{batch}, {sequence}, 6] x, int64[{batch}, {sequence}] '
        f"{mask}) => (float[{batch}, {sequence}, 6] y) {{ {text} }}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), n) for n, array in constants.items())
    return open_network(model)


def padded(mask: str = "attention_mask") -> dict[str, np.ndarray]:
    """The sentences in one array, with large numbers at the padding."""
    x = np.full((len(LENGTHS), LONGEST, WIDTH), 3.0, np.float32)
    real = np.zeros((len(LENGTHS), LONGEST), np.int64)
    for place, sentence in enumerate(SENTENCES):
        x[place, : sentence.shape[1]], real[place, : sentence.shape[1]] = sentence[0], 1
    return {"x": x, mask: real}


def collected(network: Network, data: object, kind: str = "gaussian") -> Statistics:
    """Statistics; noise is drawn position by position, so that padding leaves that of real positions as it is."""
    return collect(network, open_dataset(data, specs_of(network.model)), heads={"y": kind})


@pytest.fixture(autouse=True)
def all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moments, "_INPUT_COST", 1e9)
    monkeypatch.setattr(_moments, "_OUTPUT_COST", 1e9)


@pytest.mark.parametrize("kind", ["gaussian", "embedding"])
def test_padded_sentences_give_the_statistics_of_single_ones(kind: str):
    network = encoder()
    single = [{"x": s, "attention_mask": np.ones(s.shape[:2], np.int64)} for s in SENTENCES]
    one, other = collected(network, single, kind), collected(network, padded(), kind)
    ratio = one.heads[0].scale / other.heads[0].scale  # cotangents are in its units
    assert len(other.layers) == 6
    assert not other.skipped
    for name, expected in one.layers.items():
        found = other.layers[name]
        assert found.positions == expected.positions == sum(LENGTHS)
        np.testing.assert_allclose(found.input_second_moment, expected.input_second_moment, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.input_sum, expected.input_sum, rtol=1e-4, atol=1e-4)
        scaled = expected.cotangent_second_moment * ratio**2
        np.testing.assert_allclose(found.cotangent_second_moment, scaled, rtol=1e-3, atol=1e-3 * scaled.max())
        np.testing.assert_allclose(found.saliency_sum, expected.saliency_sum * ratio**2, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.common.input_mean, expected.common.input_mean, rtol=1e-4, atol=1e-4)
        means = expected.common.cotangent_mean_square * ratio**2
        assert found.common.cotangent_mean_square == pytest.approx(means, rel=1e-3)


def encoded(network: Network, x: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
    """What the layers of the encoder give, by name, with gradients and in double precision."""
    arrays = {layer.output: layer.weight_value.const_value.numpy() for layer in network.prunable}
    weights = {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}
    found: dict[str, torch.Tensor] = {}

    def product(name: str, value: torch.Tensor) -> torch.Tensor:
        found[name] = value @ weights[name]
        found[name].requires_grad_().retain_grad()
        return found[name]

    given = torch.from_numpy(x).double()
    q, k, v = (product(name, given) for name in "qkv")
    scores = q @ k.transpose(1, 2) - 1e4 * (1 - torch.from_numpy(mask).double())[:, None]
    product("y", product("h", product("o", scores.softmax(-1) @ v) + given).relu())
    return found


def sampled(head: Head) -> np.ndarray:
    """The noise of every sentence."""
    return np.concatenate([sample_noise([head], {"y": (1, WIDTH)}, 0, n)[0] for n in range(len(LENGTHS))])


def mean(value: torch.Tensor, real: np.ndarray) -> torch.Tensor:
    """Over the real positions, ``[n, c]``."""
    return torch.einsum("ntc,nt->nc", value, torch.from_numpy(real / real.sum(1, keepdims=True)))


@pytest.mark.parametrize("mask", ["attention_mask", "flags"])
def test_an_embedding_is_the_gaussian_distribution_of_the_mean(mask: str):
    """By autograd; where no mask is known, all positions count."""
    network, data = encoder(mask=mask), padded(mask)
    real = data[mask] if mask == "attention_mask" else np.ones_like(data[mask])
    statistics = collected(network, data, "embedding")
    (head,) = statistics.heads
    values = encoded(network, data["x"], data[mask])
    pooled = mean(values["y"], real)
    assert (head.mask, head.weight) == ("attention_mask" if mask == "attention_mask" else "", 1.0)
    assert head.scale == pytest.approx(pooled.std(unbiased=False).item(), rel=1e-5)
    (pooled * torch.from_numpy(sampled(head)) / head.scale).sum().backward()
    assert {layer.output for layer in network.prunable} == {*"qkvohy"}
    for layer in network.prunable:
        found, cotangent = statistics.layers[layer.name], values[layer.output].grad.numpy() * real[..., None]
        expected = np.einsum("nti,ntj->ij", cotangent, cotangent)
        means = cotangent.sum(1) / real.sum(1, keepdims=True)
        np.testing.assert_allclose(found.cotangent_second_moment[0], expected, rtol=1e-3, atol=1e-4 * expected.max())
        assert found.common.cotangent_mean_square == pytest.approx(np.square(means).sum(), rel=1e-3)
        assert found.positions == real.sum()


def test_an_embedding_in_the_eigenbases():
    """The second pass finds the same mean: variances in the eigenbasis add up to the second moment of the gradient."""
    network, data = encoder(), padded()
    dataset = open_dataset(data, specs_of(network.model))
    statistics = collect_eigen_moments(network, collected(network, data, "embedding"), dataset)
    (head,) = statistics.heads
    own = next(statistics.layers[layer.name] for layer in network.prunable if layer.output == "y")
    values = encoded(network, data["x"], data["attention_mask"])
    pooled = mean(values["y"], data["attention_mask"])
    (pooled * torch.from_numpy(sampled(head)) / head.scale).sum().backward()
    centred = values["h"].detach().relu() - torch.from_numpy(own.mean)
    gradients = torch.einsum("nti,nto->nio", centred, values["y"].grad).numpy()
    assert own.eigen.second_moment.sum() == pytest.approx(np.square(gradients).sum(), rel=1e-3)


def test_a_sample_without_real_positions_has_the_embedding_zero():
    network, some = encoder(), padded()
    nothing = {"x": np.ones((1, LONGEST, WIDTH), np.float32), "attention_mask": np.zeros((1, LONGEST), np.int64)}
    more = {name: np.concatenate([array, nothing[name]]) for name, array in some.items()}
    one, other = collected(network, some, "embedding"), collected(network, more, "embedding")
    ratio = one.heads[0].scale / other.heads[0].scale
    assert ratio > 1.0  # the zero is one more vector
    for name, expected in one.layers.items():
        scaled = expected.cotangent_second_moment * ratio**2
        found = other.layers[name].cotangent_second_moment
        np.testing.assert_allclose(found, scaled, rtol=1e-3, atol=1e-4 * scaled.max())


def test_a_batch_of_nothing_but_padding_adds_nothing():
    network = encoder(batch="1")
    nothing = {"x": np.ones((1, 3, WIDTH), np.float32), "attention_mask": np.zeros((1, 3), np.int64)}
    single = [{"x": s, "attention_mask": np.ones(s.shape[:2], np.int64)} for s in SENTENCES]
    one, other = collected(network, single), collected(network, [*single, nothing])
    for name, expected in one.layers.items():
        assert other.layers[name].positions == expected.positions
        assert other.layers[name].samples == expected.samples + 1
        np.testing.assert_allclose(other.layers[name].input_second_moment, expected.input_second_moment, rtol=1e-5)


def test_a_refit_does_not_fit_to_padding():
    """Real positions are met as well as without padding; where the padding is, anything goes."""
    network, data = encoder(), padded()
    several = {name: np.concatenate([array] * 4) for name, array in data.items()}
    several["x"] = several["x"] + np.random.default_rng(2).standard_normal(several["x"].shape).astype(np.float32)
    errors = {}
    for fill in (0.0, 300.0):
        filled = dict(several, x=np.where(several["attention_mask"][..., None] > 0, several["x"], np.float32(fill)))
        result = kfe.prune(network, filled, kfe.Macs(0.7), max_samples=None, measure=False, round_to=1)
        old, new = (create_session(serialize(m)).run(None, several)[0] for m in (network.original, result.ir_model))
        real = several["attention_mask"] > 0
        errors[fill] = np.square(new - old)[real].mean() / old[real].var()
    assert errors[300.0] == pytest.approx(errors[0.0], rel=1e-3)
    assert errors[300.0] < 0.3


@pytest.mark.parametrize("mask", ["attention_mask", "input_mask_1"])
def test_masks_are_known_by_name(mask: str):
    padding = find_padding(encoder(mask=mask).model)
    assert padding is not None
    assert padding.mask == mask
    assert {name: padding.ranks[name] for name in ("q", "h", "y", "p")} == {"q": 3, "h": 3, "y": 3, "p": 3}
    assert "kt" not in padding.ranks


def test_fixed_sizes_and_other_names():
    fixed = find_padding(encoder("2", "5").model)
    assert fixed is not None
    assert fixed.ranks["h"] == 3
    assert find_padding(encoder(mask="flags").model) is None
