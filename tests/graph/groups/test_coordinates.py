"""Units against sets that are merged one by one."""

from __future__ import annotations

import numpy as np

from onnx_kfe.graph.groups._coordinates import STAYS, Coordinates


def test_units_are_what_merging_sets_gives():
    random = np.random.default_rng(0)
    for _ in range(20):
        coordinates, count = Coordinates(), 30
        ids = np.concatenate([coordinates.fresh(10), coordinates.fresh(20)])
        assert list(ids) == list(range(count))
        sets = [{each} for each in ids]
        frozen = set(random.integers(0, count, 3).tolist())
        for _ in range(4):
            first, second = random.integers(0, count, (2, 5))
            coordinates.unite(first, second, "never")
            for one, other in zip(first, second, strict=True):
                merged = sets[one] | sets[other]
                for each in merged:
                    sets[each] = merged
        coordinates.freeze(np.array(sorted(frozen)), "frozen")
        roots = coordinates.roots(ids)
        for one in ids:
            assert {other for other in ids if roots[other] == roots[one]} == sets[one]
            assert (coordinates.reason(roots[one]) == "frozen") == bool(sets[one] & frozen)


def test_reasons_outlive_unions_and_the_first_counts():
    coordinates = Coordinates()
    ids = coordinates.fresh(4)
    coordinates.freeze(ids[3:], "first")
    coordinates.unite(ids[:3], ids[1:], "never")
    coordinates.freeze(ids, "second")
    assert {coordinates.reason(root) for root in coordinates.roots(ids)} == {"first"}


def test_what_meets_indices_that_stay_stays():
    coordinates = Coordinates()
    ids = coordinates.fresh(4)
    coordinates.unite(ids[:2], np.array([STAYS, STAYS]), "met")
    coordinates.unite(np.array([STAYS]), ids[2:3], "met")
    assert [coordinates.reason(each) for each in ids] == ["met", "met", "met", None]
    coordinates.unite(None, ids[3:], "all stay")
    assert coordinates.reason(ids[3]) == "all stay"
    assert list(coordinates.roots(np.array([STAYS, 1]))) == [STAYS, 1]
