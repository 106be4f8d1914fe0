"""The gated delta rule (Gated DeltaNet: Yang et al. 2024, arXiv 2412.06464): linear attention.

Each head keeps a state of K x Y numbers in place of keys and values. A token with query q, key k,
value v, log decay g and rate beta changes it, and reads from it::

    state = exp(g) * state
    state = state + outer(k, beta * (v - k @ state))
    out = q @ state

So a run of tokens is an affine map of the state, ``state -> transfer_KK @ state + update_KY``.
Maps of consecutive runs compose, which is what context parallelism needs; a map is as large for a
million tokens as for one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mpishard.arithmetic.ops import silu

# Tokens that are computed by one set of matrix products. The work on pairs of them grows with it,
# that on states shrinks.
CHUNK = 64
# Added to the squared length of queries and keys.
NORM_EPS = 1e-6


class AffineMap(NamedTuple):
    """What a run of tokens does to the state of each head."""

    transfer_hKK: np.ndarray
    update_hKY: np.ndarray

    def __call__(self, state_hKY: np.ndarray) -> np.ndarray:
        """The state after the run."""
        return self.transfer_hKK @ state_hKY + self.update_hKY


def causal_conv(x_SX: np.ndarray, before_TX: np.ndarray, taps_XT: np.ndarray) -> np.ndarray:
    """``silu`` of the causal convolution of each channel X, which looks at the T positions up to
    its own: (S, X). `before_TX` are the T - 1 rows before the first, zeros before the beginning of
    a sequence."""
    S, taps = len(x_SX), taps_XT.shape[1]
    rows_TX = np.concatenate([before_TX, x_SX])
    return silu(sum(rows_TX[tap : tap + S] * taps_XT[:, tap] for tap in range(taps)))


def unit_length(x: np.ndarray) -> np.ndarray:
    """`x` at length 1 along its last axis."""
    return x / np.sqrt(np.vecdot(x, x) + NORM_EPS)[..., np.newaxis]


def gated_delta_rule(
    q_ShK: np.ndarray,
    k_ShK: np.ndarray,
    v_ShY: np.ndarray,
    log_decay_Sh: np.ndarray,
    rate_Sh: np.ndarray,
    state_hKY: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of consecutive tokens and the state after them, ``(out_ShY, state_hKY)``.

    Queries and keys are taken at unit length, and scores divided by the square root of K. Tokens
    are processed in chunks (Yang et al. 2024, arXiv 2406.06484): with the products of the keys of a
    chunk, all its updates are the solution of one triangular system.
    """
    q_hSK = np.ascontiguousarray(unit_length(q_ShK).transpose(1, 0, 2)) * q_ShK.shape[2] ** -0.5
    k_hSK = np.ascontiguousarray(unit_length(k_ShK).transpose(1, 0, 2))
    v_hSY = v_ShY.transpose(1, 0, 2)
    out_hSY = np.empty(v_hSY.shape, v_ShY.dtype)
    for start in range(0, len(q_ShK), CHUNK):
        chunk = slice(start, start + CHUNK)
        out_hSY[:, chunk], state_hKY = _chunk(
            q_hSK[:, chunk],
            k_hSK[:, chunk],
            v_hSY[:, chunk],
            log_decay_Sh[chunk].T,
            rate_Sh[chunk].T[..., np.newaxis],
            state_hKY,
        )
    return out_hSY.transpose(1, 0, 2), state_hKY


def gated_delta_map(
    q_ShK: np.ndarray,
    k_ShK: np.ndarray,
    v_ShY: np.ndarray,
    log_decay_Sh: np.ndarray,
    rate_Sh: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, AffineMap]:
    """The same for tokens whose first state is not known yet: their outputs from a state of zeros,
    what queries then read from a first state, and the map from it to the last one,
    ``(out_ShY, reach_ShK, map)``. The whole output is ``out_ShY + reach_ShK @ state``.

    The columns of a state do not mix. So the map is found by K columns more, which begin as the
    identity and are given values of zero.
    """
    S, h, K = k_ShK.shape
    Y = v_ShY.shape[2]
    values_ShX = np.concatenate([v_ShY, np.zeros((S, h, K), v_ShY.dtype)], axis=2)  # X: Y, then K
    state_hKX = np.zeros((h, K, Y + K), v_ShY.dtype)
    state_hKX[..., Y:] = np.eye(K)
    out_ShX, state_hKX = gated_delta_rule(
        q_ShK, k_ShK, values_ShX, log_decay_Sh, rate_Sh, state_hKX
    )
    return out_ShX[..., :Y], out_ShX[..., Y:], AffineMap(state_hKX[..., Y:], state_hKX[..., :Y])


def _chunk(
    q_hSK: np.ndarray,
    k_hSK: np.ndarray,
    v_hSY: np.ndarray,
    log_decay_hS: np.ndarray,
    rate_hS1: np.ndarray,
    state_hKY: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of one chunk, (h, S, Y), and the state after it."""
    total_hS = np.cumsum(log_decay_hS, axis=1)  # of the decay since before the chunk
    since_hSS = total_hS[:, :, np.newaxis] - total_hS[:, np.newaxis]
    earlier_SS = np.tri(len(q_hSK[0]), dtype=bool)  # the second token is not after the first
    decay_hSS = np.exp(np.where(earlier_SS, since_hSS, -np.inf))
    decay_hS1 = np.exp(total_hS)[..., np.newaxis]

    # new_S = rate_S (v_S - k_S @ (state as token S finds it)), which has the updates before it.
    system_hSS = rate_hS1 * (k_hSK @ k_hSK.transpose(0, 2, 1)) * decay_hSS
    system_hSS[:, np.arange(system_hSS.shape[1]), np.arange(system_hSS.shape[1])] = 1
    new_hSY = np.linalg.solve(system_hSS, rate_hS1 * (v_hSY - decay_hS1 * (k_hSK @ state_hKY)))

    scores_hSS = (q_hSK @ k_hSK.transpose(0, 2, 1)) * decay_hSS
    out_hSY = decay_hS1 * (q_hSK @ state_hKY) + scores_hSS @ new_hSY
    left_hS1 = np.exp(total_hS[:, -1:] - total_hS)[..., np.newaxis]  # until the end of the chunk
    state_hKY = decay_hS1[:, -1:] * state_hKY + (left_hS1 * k_hSK).transpose(0, 2, 1) @ new_hSY
    return out_hSY, state_hKY
