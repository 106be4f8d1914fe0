"""The sum over a token's experts, whose order is promised: ascending, whatever the layout."""

from __future__ import annotations

import numpy as np

from mpishard.parallel.expert import combine


def test_experts_are_added_up_in_ascending_order():
    """In float64, 1e16 + 1 is 1e16: only one order of these three gives 1."""
    y_nAD = np.array([1e16, -1e16, 1.0]).reshape(1, 3, 1)
    assert combine(y_nAD, np.ones((1, 3))).item() == 1
    assert combine(y_nAD[:, ::-1], np.ones((1, 3))).item() == 0


def test_weights_are_those_of_the_experts():
    y_nAD = np.arange(12.0).reshape(2, 3, 2)
    topk_weights_nA = np.array([[1.0, 0, 0], [0, 0.5, 2]])
    np.testing.assert_array_equal(combine(y_nAD, topk_weights_nA), [[0, 1], [24, 26.5]])
