"""The gated delta rule in chunks and as a map, against the rule token by token."""

from __future__ import annotations

import numpy as np
import pytest

from mpishard.arithmetic.delta_rule import (
    CHUNK,
    causal_conv,
    gated_delta_map,
    gated_delta_rule,
    unit_length,
)

H, K, Y = 3, 5, 7
Tokens = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
LENGTHS = (1, 2, CHUNK, CHUNK + 1, 2 * CHUNK + 13)


def inputs(length: int) -> tuple[Tokens, np.ndarray]:
    random = np.random.RandomState(length)
    q_ShK, k_ShK = random.standard_normal((2, length, H, K))
    v_ShY = random.standard_normal((length, H, Y))
    log_decay_Sh, rate_Sh = -random.exponential(0.3, (length, H)), random.random_sample((length, H))
    return (q_ShK, k_ShK, v_ShY, log_decay_Sh, rate_Sh), random.standard_normal((H, K, Y))


def token_by_token(
    q_ShK: np.ndarray,
    k_ShK: np.ndarray,
    v_ShY: np.ndarray,
    log_decay_Sh: np.ndarray,
    rate_Sh: np.ndarray,
    state_hKY: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    state_hKY, out_ShY = state_hKY.copy(), np.empty_like(v_ShY)
    q_ShK, k_ShK = unit_length(q_ShK) / np.sqrt(K), unit_length(k_ShK)
    for t, h in np.ndindex(*rate_Sh.shape):
        state_hKY[h] *= np.exp(log_decay_Sh[t, h])
        error_Y = v_ShY[t, h] - k_ShK[t, h] @ state_hKY[h]
        state_hKY[h] += np.outer(k_ShK[t, h], rate_Sh[t, h] * error_Y)
        out_ShY[t, h] = q_ShK[t, h] @ state_hKY[h]
    return out_ShY, state_hKY


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_are_the_rule_token_by_token(length):
    tokens, state_hKY = inputs(length)
    for found, expected in zip(
        gated_delta_rule(*tokens, state_hKY), token_by_token(*tokens, state_hKY), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_run_is_an_affine_map(length):
    tokens, state_hKY = inputs(length)
    out_ShY, last_hKY = token_by_token(*tokens, state_hKY)
    found_ShY, reach_ShK, change = gated_delta_map(*tokens)
    found_ShY = found_ShY + np.einsum("shk,hky->shy", reach_ShK, state_hKY)
    np.testing.assert_allclose(found_ShY, out_ShY, rtol=0, atol=1e-13)
    np.testing.assert_allclose(change(state_hKY), last_hKY, rtol=0, atol=1e-13)


def test_a_strong_decay_forgets_and_does_not_overflow():
    (q_ShK, k_ShK, v_ShY, log_decay_Sh, rate_Sh), state_hKY = inputs(CHUNK)
    with np.errstate(all="raise", under="ignore"):
        out_ShY, _ = gated_delta_rule(q_ShK, k_ShK, v_ShY, 1000 * log_decay_Sh, rate_Sh, state_hKY)
    expected, _ = token_by_token(q_ShK, k_ShK, v_ShY, 1000 * log_decay_Sh, rate_Sh, state_hKY)
    np.testing.assert_allclose(out_ShY, expected, rtol=0, atol=1e-13)


def test_the_convolution_looks_back_at_earlier_rows():
    x_SX = np.arange(8.0).reshape(4, 2)
    taps_XT = np.array([[100.0, 10.0, 1.0], [0.0, 0.0, 1.0]])
    before_TX = np.array([[-1.0, 0.0], [-2.0, 0.0]])
    y_SX = causal_conv(x_SX, before_TX, taps_XT)
    sums = np.array([[-120.0, 1], [-178, 3], [24, 5], [246, 7]])
    np.testing.assert_allclose(y_SX, sums / (1 + np.exp(-sums)), atol=1e-12)
    again_SX = causal_conv(x_SX[2:], x_SX[:2], taps_XT)
    np.testing.assert_array_equal(again_SX, y_SX[2:])
