"""Chains against convolutions run by torch, and costs counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnx_kfe.graph import Geometry
from onnx_kfe.planning import Cost, Link, Stage, chain_cost, compose, dense_cost, dense_link, sized

SIDES = (9, 8)


def stage(groups: int, out: int, inside: int, *kernel: int, axes: tuple[int, ...] = (), seed: int = 0) -> Stage:
    return Stage(np.random.default_rng(seed).normal(size=(groups, out, inside, *kernel)), axes)


def reordering(channels: int, seed: int) -> Stage:
    return Stage(np.random.default_rng(seed).permutation(channels).astype(float))


CHAINS = {  # stages, input channels, groups of the whole
    "one": ([stage(1, 5, 4, 3, 3, axes=(0, 1))], 4, 1),
    "one in groups": ([stage(2, 5, 4, 3, 3, axes=(0, 1))], 8, 2),
    "two factors": ([stage(1, 3, 4), stage(1, 5, 3, seed=1)], 4, 1),
    "tucker": ([stage(1, 3, 4), stage(1, 2, 3, 3, 2, axes=(0, 1), seed=1), stage(1, 5, 2, seed=2)], 4, 1),
    "tucker in groups": ([stage(2, 3, 4), stage(2, 2, 3, 3, 2, axes=(0, 1), seed=1), stage(2, 5, 2, seed=2)], 8, 2),
    "rows then columns": ([stage(1, 3, 4, 3, axes=(0,)), stage(1, 5, 3, 2, axes=(1,), seed=1)], 4, 1),
    "columns then rows": ([stage(1, 3, 4, 2, axes=(1,)), stage(1, 5, 3, 3, axes=(0,), seed=1)], 4, 1),
    "depthwise": ([stage(1, 6, 4), stage(6, 1, 1, 3, 2, axes=(0, 1), seed=1), stage(1, 5, 6, seed=2)], 4, 1),
    "finer groups within": ([stage(2, 4, 3), stage(4, 3, 2, 3, 3, axes=(0, 1), seed=1)], 6, 2),
    "blocks reordered": ([reordering(6, 1), stage(3, 4, 2, 3, 2, axes=(0, 1)), reordering(12, 2)], 6, 1),
}


def run(stages: list[Stage], x: torch.Tensor) -> torch.Tensor:
    """Stage by stage, without padding."""
    for part in stages:
        if part.weight.ndim == 1:
            x = x[:, torch.from_numpy(part.weight.astype(int))]
            continue
        groups, out, inside, *carried = part.weight.shape
        kernel = [carried[part.axes.index(axis)] if axis in part.axes else 1 for axis in range(2)]
        weight = torch.from_numpy(part.weight.reshape(groups * out, inside, *kernel))
        x = torch.nn.functional.conv2d(x, weight, groups=groups)
    return x


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_the_convolution_that_it_composes_to(name):
    stages, channels, groups = CHAINS[name]
    x = torch.from_numpy(np.random.default_rng(9).normal(size=(2, channels, *SIDES)))
    weight = compose(stages)
    assert len(weight) == groups
    whole = Stage(weight, tuple(range(weight.ndim - 3)))
    expected = run(stages, x)
    assert expected.abs().mean() > 0.1
    np.testing.assert_allclose(run([whole], x), expected, atol=1e-10)


@pytest.mark.parametrize("name", CHAINS)
def test_the_beginnings_of_a_chain_compose_as_well(name):
    stages, channels, _ = CHAINS[name]
    x = torch.from_numpy(np.random.default_rng(9).normal(size=(1, channels, *SIDES)))
    for length in range(1, len(stages)):
        weight = compose(stages[:length])
        whole = Stage(weight, tuple(range(weight.ndim - 3)))
        np.testing.assert_allclose(run([whole], x), run(stages[:length], x), atol=1e-10)


STRIDED = Geometry(8, 12, (3, 5), (2, 3), 1, output_size=(5, 4), input_size=(10, 12))


def test_costs_of_strided_chains_by_hand():
    """Strides act where the axis is carried: links before it run at the full extent."""
    both = (0, 1)
    tucker = [Link(8, 4), Link(4, 6, axes=both), Link(6, 12)]
    assert chain_cost(STRIDED, tucker) == Cost(
        10 * 12 * 8 * 4 + 5 * 4 * 4 * 6 * 15 + 5 * 4 * 6 * 12, 8 * 4 + 4 * 6 * 15 + 6 * 12
    )
    spatial = [Link(8, 7, axes=(0,)), Link(7, 12, axes=(1,))]
    assert chain_cost(STRIDED, spatial) == Cost(5 * 12 * 8 * 7 * 3 + 5 * 4 * 7 * 12 * 5, 8 * 7 * 3 + 7 * 12 * 5)
    separable = [Link(8, 9), Link(9, 9, 9, both), Link(9, 12)]
    assert chain_cost(STRIDED, separable) == Cost(
        10 * 12 * 8 * 9 + 5 * 4 * 9 * 15 + 5 * 4 * 9 * 12, 8 * 9 + 9 * 15 + 9 * 12
    )
    blocks = [Link(8, 8, reorders=True), Link(8, 12, 4, both), Link(12, 12, reorders=True)]
    assert chain_cost(STRIDED, blocks) == Cost(5 * 4 * 12 * 2 * 15, 12 * 2 * 15)


def test_costs_of_products_by_hand():
    """Each leading axis but the batch is so many runs."""
    assert chain_cost(Geometry(8, 12, repeats=7), [Link(8, 3), Link(3, 12)]) == Cost(7 * (24 + 36), 24 + 36)


@pytest.mark.parametrize("geometry", [STRIDED, Geometry(8, 12, repeats=7), Geometry(8, 12, (3,), (2,), 4, (5,), (9,))])
def test_the_layer_as_it_is_is_a_chain_of_one_link(geometry):
    assert chain_cost(geometry, [dense_link(geometry)]) == dense_cost(geometry)
    assert dense_cost(geometry).macs == geometry.positions * geometry.out_channels * geometry.patch_size


def test_extents_change_where_an_axis_is_carried():
    links = [Link(8, 8, axes=(1,)), Link(8, 8), Link(8, 12, axes=(0,))]
    assert [(before, after) for _, before, after in sized(STRIDED, links)] == [
        ((10, 12), (10, 4)), ((10, 4), (10, 4)), ((10, 4), (5, 4)),
    ]  # fmt: skip


def test_saving_is_less_of_one_and_no_more_of_the_other():
    cost = Cost(10, 10, 10)
    assert Cost(9, 10).saves(cost)
    assert Cost(10, 9).saves(cost)
    assert not Cost(10, 10).saves(cost)
    assert not Cost(1, 11).saves(cost)
    assert not Cost(11, 1).saves(cost)
    assert Cost(9, 9, 99).saves(cost), "latency is no part of it"
