"""Routing against explicit loops: ties, biases, groups and the two ways to weigh."""

from __future__ import annotations

import numpy as np
import pytest

from mpishard.arithmetic.routing import ExpertCapacity, Router, sigmoid, softmax
from mpishard.config.layout import TOKEN_DROP_POLICIES


def plain(router: Router, logits_E: np.ndarray, bias_E: np.ndarray) -> dict[int, float]:
    """One token's experts and weights, one decision at a time."""
    if router.scoring == "softmax":
        scores = [np.exp(logit) / np.exp(logits_E).sum() for logit in logits_E]
    else:
        scores = [1 / (1 + np.exp(-logit)) for logit in logits_E]
    choice = [score + bias for score, bias in zip(scores, bias_E, strict=True)]
    size = len(choice) // router.n_group
    members = [range(group * size, (group + 1) * size) for group in range(router.n_group)]
    if router.group_score == "max":
        best = [max(choice[e] for e in group) for group in members]
    else:
        best = [sum(sorted(choice[e] for e in group)[-2:]) for group in members]
    kept = sorted(range(router.n_group), key=lambda group: (-best[group], group))
    allowed = [e for group in kept[: router.topk_group] for e in members[group]]
    chosen = sorted(allowed, key=lambda e: (-choice[e], e))[: router.top_k]
    total = sum(scores[e] for e in chosen) if router.norm_topk_prob else 1
    return {e: scores[e] / total * router.routed_scaling_factor for e in sorted(chosen)}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalized, scaling", [(True, 1.0), (False, 2.5)])
@pytest.mark.parametrize(
    "groups, kept, score", [(1, 1, "max"), (4, 2, "max"), (3, 2, "top-2 sum"), (4, 3, "top-2 sum")]
)
@pytest.mark.parametrize("biased", [False, True])
def test_route(scoring, normalized, scaling, groups, kept, score, biased):
    router = Router(3, scoring, normalized, scaling, groups, kept, score)
    random = np.random.RandomState(0)
    logits_nE = random.standard_normal((40, 12))
    bias_E = random.standard_normal(12) if biased else np.zeros(12)
    topk_ids_nA, topk_weights_nA = router.route(logits_nE, bias_E if biased else None)
    for ids_A, weights_A, logits_E in zip(topk_ids_nA, topk_weights_nA, logits_nE, strict=True):
        expected = plain(router, logits_E, bias_E)
        assert ids_A.tolist() == list(expected)
        np.testing.assert_allclose(weights_A, list(expected.values()), rtol=1e-12)


def test_of_equal_scores_the_lowest_experts_are_chosen():
    topk_ids_nA, topk_weights_nA = Router(2).route(np.zeros((3, 5)))
    assert topk_ids_nA.tolist() == [[0, 1]] * 3
    np.testing.assert_allclose(topk_weights_nA, 0.2)


def test_no_tokens_go_nowhere():
    topk_ids_nA, topk_weights_nA = Router(2, norm_topk_prob=True, n_group=2).route(np.zeros((0, 4)))
    assert topk_ids_nA.shape == topk_weights_nA.shape == (0, 2)


def test_scores_of_any_size():
    large = np.array([[1e4, -1e4, 0.0]])
    np.testing.assert_array_equal(softmax(large), [[1, 0, 0]])
    np.testing.assert_array_equal(sigmoid(large), [[1, 0, 0.5]])


def test_an_expert_takes_its_even_share_times_the_factor():
    assert ExpertCapacity(1).max_rows(tokens=12, top_k=2, experts=6) == 4
    assert (
        ExpertCapacity(1.1).max_rows(tokens=30, top_k=2, experts=6) == 11
    )  # 11.000000000000002 in binary
    assert ExpertCapacity(1.25).max_rows(tokens=1, top_k=2, experts=8) == 1
    assert ExpertCapacity(1.25).max_rows(tokens=0, top_k=2, experts=8) == 0


def test_what_an_expert_keeps():
    topk_ids_nA = np.array([[0, 1], [0, 2], [0, 1], [0, 2]])
    topk_weights_nA = np.array([[0.5, 0.5], [0.7, 0.3], [0.7, 0.1], [0.6, 0.3]])
    first, largest = (
        ExpertCapacity(0.75, "position"),
        ExpertCapacity(0.75),
    )  # 2 rows of 8 for 3 experts
    assert first.keep_mask(topk_ids_nA, topk_weights_nA, 3).tolist() == [
        [1, 1],
        [1, 1],
        [0, 1],
        [0, 1],
    ]
    assert largest.keep_mask(topk_ids_nA, topk_weights_nA, 3).tolist() == [
        [0, 1],
        [1, 1],
        [1, 1],
        [0, 1],
    ]
    tied_nA = np.ones_like(topk_weights_nA)
    assert largest.keep_mask(topk_ids_nA, tied_nA, 3).tolist() == [[1, 1], [1, 1], [0, 1], [0, 1]]


def test_a_token_alone_loses_nothing():
    """A token's experts differ, and each takes at least one row."""
    for drop in TOKEN_DROP_POLICIES:
        assert ExpertCapacity(0.01, drop).keep_mask(np.array([[1, 4, 5]]), np.ones((1, 3)), 7).all()
