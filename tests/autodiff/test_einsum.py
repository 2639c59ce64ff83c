import pytest
import torch

from tests.autodiff.graphs import assert_gradients, build, differentiate, normal

PAIRS = [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("ij, jk", (2, 3), (3, 4)),
    ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("bhqk,bkhd->bqhd", (2, 3, 4, 6), (2, 6, 3, 5)),
    ("nct,cw->nctw", (2, 3, 4), (3, 5)),
    ("i,j->ij", (3,), (4,)),
    ("ij,ij->", (3, 4), (3, 4)),
    ("abc,c->ab", (2, 3, 4), (4,)),
    ("abc,d->bd", (2, 3, 4), (5,)),
    ("...ij,...jk->...ik", (2, 6, 3, 4), (2, 6, 4, 5)),
    ("...ij,...jk->...ik", (2, 6, 3, 4), (1, 6, 4, 5)),
    ("...ij,jk->...ik", (2, 6, 3, 4), (4, 5)),
]


@pytest.mark.parametrize(("equation", "left", "right"), PAIRS)
def test_of_two(equation, left, right):
    assert_gradients(
        [("Einsum", "a b", "y", {"equation": equation})],
        {"a": normal(*left), "b": normal(*right, seed=1)},
        lambda a, b: torch.einsum(equation, a, b),
    )


@pytest.mark.parametrize("equation", ["ijk->kij", "ijk->ik", "ijk->", "...k->k...", "i...->..."])
def test_of_one(equation):
    assert_gradients(
        [("Einsum", "a", "y", {"equation": equation})],
        {"a": normal(2, 3, 4)},
        lambda a: torch.einsum(equation, a),
        shapes={"a": ["N", "T", 4]},
    )


def test_of_three():
    equation = "ij,jk,kl->il"
    inputs = {"a": normal(2, 3), "b": normal(3, 4, seed=1), "c": normal(4, 5, seed=2)}
    assert_gradients(
        [("Einsum", "a b c", "y", {"equation": equation})], inputs, lambda *given: torch.einsum(equation, *given)
    )


def test_a_diagonal_is_blocked():
    model = build([("Einsum", "a", "y", {"equation": "ii->i"})], {"a": normal(3, 3)})
    assert "along a diagonal" in differentiate(model, ["a"]).blocked.popitem()[1]
