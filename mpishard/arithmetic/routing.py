"""Routing tokens to experts: scores, the choice of top_k experts, and the weights of their outputs.

Families differ in the scores (a softmax over all experts or a sigmoid of each), in what the choice
goes by (the scores, or scores with a bias that takes no part in the weights, or only those in the
best groups of experts), and in the weights (the scores as they are or divided by their sum).
Sources: Mixtral, arXiv 2401.04088; DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437.

`ExpertCapacity` is a limit on the rows that an expert takes, as GShard (arXiv 2006.16668) and
Switch Transformers (arXiv 2101.03961) have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mpishard.arithmetic.ops import sigmoid


@dataclass(frozen=True)
class Router:
    """How tokens choose `top_k` experts. `n_group` of neighbouring experts are scored by the "max"
    or the "top-2 sum" of their members' scores, and only members of the best `topk_group` can be
    chosen."""

    top_k: int
    scoring: str = "softmax"  # or "sigmoid", or "sparsemixer" with its `jitter`
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    norm_min: float = 0.0  # the least sum that weights are divided by
    jitter: float = 0.0

    def route(
        self, logits_nE: np.ndarray, bias_E: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The experts of each token, ascending, and the weights of their outputs: ``(ids_nA,
        weights_nA)``. `bias_E` is added to the scores for choosing alone. Of equal scores the
        lowest expert's comes first."""
        if self.scoring == "sparsemixer":
            return sparse_mixer(logits_nE, self.jitter)
        scores_nE = SCORINGS[self.scoring](logits_nE)
        scores_for_choice_nE = scores_nE if bias_E is None else scores_nE + bias_E
        if self.n_group > 1:
            scores_for_choice_nE = self._in_topk_groups(scores_for_choice_nE)
        topk_ids_nA = np.argsort(-scores_for_choice_nE, axis=1, kind="stable")[:, : self.top_k]
        topk_ids_nA = np.sort(topk_ids_nA, axis=1)
        topk_weights_nA = np.take_along_axis(scores_nE, topk_ids_nA, axis=1)
        if self.norm_topk_prob:
            sum_n1 = topk_weights_nA.sum(axis=1, keepdims=True)
            topk_weights_nA = topk_weights_nA / np.maximum(sum_n1, sum_n1.dtype.type(self.norm_min))
        return topk_ids_nA, topk_weights_nA * topk_weights_nA.dtype.type(self.routed_scaling_factor)

    def _in_topk_groups(self, scores_for_choice_nE: np.ndarray) -> np.ndarray:
        """The scores, -inf for the experts of other groups."""
        n, E = scores_for_choice_nE.shape
        scores_nXE = scores_for_choice_nE.reshape(n, self.n_group, E // self.n_group)
        if self.group_score == "max":
            best_nX = scores_nXE.max(axis=2)
        else:
            best_nX = np.sort(scores_nXE, axis=2)[:, :, -2:].sum(axis=2)
        kept_nX = np.argsort(-best_nX, axis=1, kind="stable")[:, : self.topk_group]
        is_kept_nX = np.zeros((n, self.n_group), bool)
        np.put_along_axis(is_kept_nX, kept_nX, True, axis=1)
        return np.where(is_kept_nX[:, :, np.newaxis], scores_nXE, -np.inf).reshape(n, E)


def sparse_mixer(logits_nE: np.ndarray, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """The two best experts of each token, ascending, and their weights: ``(ids_n2, weights_n2)``
    (Liu et al. 2024, arXiv 2409.12136). A weight is the softmax over the experts whose scores lie
    less than ``2 * jitter`` below the chosen one's, relatively; the first expert takes no part in
    the second's."""
    left_nE = logits_nE.copy()
    ids_n2 = np.empty((len(logits_nE), 2), np.int64)
    weights_n2 = np.empty((len(logits_nE), 2), logits_nE.dtype)
    for choice in range(2):
        best_n1 = left_nE.argmax(axis=1, keepdims=True)
        top_n1 = np.take_along_axis(left_nE, best_n1, axis=1)
        is_far_nE = (top_n1 - logits_nE) / np.maximum(np.abs(logits_nE), top_n1) > 2 * jitter
        near_nE = softmax(np.where(is_far_nE, -np.inf, left_nE).astype(logits_nE.dtype))
        ids_n2[:, choice] = best_n1[:, 0]
        weights_n2[:, choice] = np.take_along_axis(near_nE, best_n1, axis=1)[:, 0]
        np.put_along_axis(left_nE, best_n1, -np.inf, axis=1)
    order_n2 = ids_n2.argsort(axis=1)
    return (
        np.take_along_axis(ids_n2, order_n2, axis=1),
        np.take_along_axis(weights_n2, order_n2, axis=1),
    )


@dataclass(frozen=True)
class ExpertCapacity:
    """An expert takes at most `factor` times its even share of the (token, expert) pairs, rounded
    up. Kept are the pairs of the largest weights ("probs"; of equal ones the first token's), or
    those of the first tokens ("position"), as Megatron-LM's moe_token_drop_policy has it."""

    factor: float
    drop_policy: str = "probs"

    def max_rows(self, tokens: int, top_k: int, experts: int) -> int:
        """The pairs that an expert takes of `tokens` tokens, each of which chooses `top_k` experts.

        >>> ExpertCapacity(1.1).max_rows(tokens=30, top_k=2, experts=6)
        11
        """
        # The factor as it was typed: in binary 0.1 * 3 is more than 0.3.
        return math.ceil(Fraction(str(self.factor)) * tokens * top_k / experts)

    def keep_mask(
        self, topk_ids_nA: np.ndarray, topk_weights_nA: np.ndarray, experts: int
    ) -> np.ndarray:
        """Which of the tokens' choices their experts take: (n, A), of type bool."""
        by = topk_weights_nA if self.drop_policy == "probs" else None
        n, A = topk_ids_nA.shape
        return position_in_expert(topk_ids_nA, by) < self.max_rows(n, A, experts)


def position_in_expert(
    topk_ids_nA: np.ndarray, topk_weights_nA: np.ndarray | None = None
) -> np.ndarray:
    """The position of each (token, expert) pair within its expert's queue, from 0: (n, A) (GShard's
    position_in_expert). Pairs queue in the order of the tokens, or by descending weight.

    >>> position_in_expert(np.array([[0, 2], [1, 2], [0, 2]])).tolist()
    [[0, 0], [0, 1], [1, 2]]
    """
    ids_b = topk_ids_nA.reshape(-1)
    keys = [ids_b] if topk_weights_nA is None else [-topk_weights_nA.reshape(-1), ids_b]
    order_b = np.lexsort(keys)  # stable, by the last key first
    sorted_b = ids_b[order_b]
    position_b = np.empty_like(order_b)
    position_b[order_b] = np.arange(len(ids_b)) - np.searchsorted(sorted_b, sorted_b)
    return position_b.reshape(topk_ids_nA.shape)


def softmax(logits_nE: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    scores_nE = np.exp(logits_nE - logits_nE.max(axis=-1, keepdims=True))
    scores_nE /= scores_nE.sum(axis=-1, keepdims=True)
    return scores_nE


SCORINGS = {"softmax": softmax, "sigmoid": sigmoid}
