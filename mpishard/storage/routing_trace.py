"""The decisions of routers, token by token, to be replayed elsewhere.

Reinforcement learning of an MoE model needs the same experts in training as in inference, but
rounding makes the routers differ; so training replays the routing of a rollout (rollout routing
replay: arXiv 2510.11370).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mpishard.errors import UserError

# Larger than every position, so that request and position combine to one number.
POSITIONS = 2**31


@dataclass(frozen=True)
class RoutingTrace:
    """The experts and weights of T tokens, sorted by request and position, without duplicates.

    `request_ids` are the ids of the requests; a request is numbered by its index in it. `where`
    names the trace in errors.
    """

    request_T: np.ndarray  # the number of the request of each token
    position_T: np.ndarray
    token_T: np.ndarray  # its id
    layers: tuple[int, ...]  # the L layers with experts
    experts_TLA: np.ndarray  # ascending
    weights_TLA: np.ndarray  # the factors of the outputs of the experts
    request_ids: tuple[str, ...]
    where: str = "the recorded routing"

    def find(
        self, request_n: np.ndarray, position_n: np.ndarray, token_n: np.ndarray
    ) -> np.ndarray:
        """The index of each of n tokens in the arrays: (n,). Raises UserError for a token that is
        not there, or that has another id there."""
        keys_T, key_n = self._keys, request_n * POSITIONS + position_n
        place_n = np.searchsorted(keys_T, key_n)
        there_n = place_n < len(keys_T)
        there_n[there_n] = keys_T[place_n[there_n]] == key_n[there_n]
        if not there_n.all():
            self._refuse(request_n, position_n, ~there_n, "has nothing for")
        same_n = self.token_T[place_n] == token_n
        if not same_n.all():
            token = self.token_T[place_n][~same_n][0]
            other = f"is of token {token}, not {token_n[~same_n][0]}, at"
            self._refuse(request_n, position_n, ~same_n, other)
        return place_n

    def of(self, request_ids: Sequence[str]) -> RoutingTrace:
        """The trace of the requests with these ids, numbered in this order. Raises UserError for an
        unknown id."""
        for name in request_ids:
            if name not in self.request_ids:
                known = ", ".join(map(repr, self.request_ids[:5])) + (
                    ", …" if self.request_ids[5:] else ""
                )
                raise UserError(f"{self.where} has no request {name!r}; it has {known}")
        number = {name: place for place, name in enumerate(request_ids)}
        number_R = np.array([number.get(name, -1) for name in self.request_ids], np.int64)
        return self.sorted_as(number_R[self.request_T], tuple(request_ids))

    def sorted_as(self, request_T: np.ndarray, request_ids: tuple[str, ...]) -> RoutingTrace:
        """The same trace with other numbers of the requests. Requests below 0 are left out."""
        order = np.lexsort([self.position_T, request_T])
        order = order[np.count_nonzero(request_T < 0) :]
        return replace(
            self,
            request_T=request_T[order],
            position_T=self.position_T[order],
            token_T=self.token_T[order],
            experts_TLA=self.experts_TLA[order],
            weights_TLA=self.weights_TLA[order],
            request_ids=request_ids,
        )

    def has_duplicates(self) -> bool:
        """Whether a token occurs twice."""
        return bool((np.diff(self._keys) == 0).any())

    @cached_property
    def _keys(self) -> np.ndarray:
        """Request and position of each token as one number, ascending."""
        return self.request_T * POSITIONS + self.position_T

    def _refuse(
        self, request_n: np.ndarray, position_n: np.ndarray, wrong_n: np.ndarray, what: str
    ) -> None:
        request, position = int(request_n[wrong_n][0]), int(position_n[wrong_n][0])
        name = self.request_ids[request] if request < len(self.request_ids) else str(request)
        raise UserError(f"{self.where} {what} position {position} of request {name!r}")
