"""The element-wise arithmetic of a decoder layer: norms, activations, gates and soft caps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.erf import erf


@dataclass(frozen=True)
class RMSNorm:
    """Scales rows to a root mean square of 1, times `weight` (Zhang and Sennrich 2019, arXiv
    1910.07467). A unit offset, as Gemma has it, is in the weight."""

    weight: np.ndarray  # (D,)
    eps: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class Multiplier:
    """Multiplies by a number: in the place of a norm after a sub-layer (Granite's
    residual_multiplier)."""

    factor: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x * x.dtype.type(self.factor)


def identity(x: np.ndarray) -> np.ndarray:
    """`x`: in the place of a norm that a family does not have."""
    return x


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """`x` scaled to a root mean square of 1 along its last axis, times `weight`."""
    mean_square = np.vecdot(x, x) / x.shape[-1]
    normed = x / np.sqrt(mean_square + eps)[..., np.newaxis]
    normed *= weight
    return normed


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(x)``."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
        gate = np.exp(-x)
    gate += 1
    return np.divide(x, gate, out=gate)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh form of the Gaussian error linear unit."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(x.dtype) * (x + 0.044715 * x**3)))


def gelu(x: np.ndarray) -> np.ndarray:
    """The Gaussian error linear unit, with the error function itself."""
    return 0.5 * x * (1 + erf(x * np.sqrt(0.5).astype(x.dtype)))


def relu(x: np.ndarray) -> np.ndarray:
    """``max(x, 0)``."""
    return np.maximum(x, 0)


def relu2(x: np.ndarray) -> np.ndarray:
    """``max(x, 0) ** 2`` (So et al. 2021, arXiv 2109.08668)."""
    return np.maximum(x, 0) ** 2


def softcap(x: np.ndarray, cap: float) -> None:
    """Replaces `x` by ``cap * tanh(x / cap)`` (Gemma 2, arXiv 2408.00118)."""
    x /= cap
    np.tanh(x, out=x)
    x *= cap


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": silu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu,
    "relu": relu,
    "relu2": relu2,
}


# (gate, up) -> hidden, of a gated feed-forward network (Shazeer 2020, arXiv 2002.05202)
GLU = Callable[[np.ndarray, np.ndarray], np.ndarray]


def glu(activation: str) -> GLU:
    """``activation(gate) * up``."""

    def hidden(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        product = ACTIVATIONS[activation](gate)
        product *= up
        return product

    return hidden


def clamped_swiglu(alpha: float, limit: float) -> GLU:
    """``gate * sigmoid(alpha * gate) * (up + 1)``, the gate cut off above `limit` and `up` beyond
    both its signs, as gpt-oss has it."""

    def hidden(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate * sigmoid(alpha * gate) * (up + 1)

    return hidden
