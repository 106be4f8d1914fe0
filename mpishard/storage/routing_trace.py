"""What routers decided, token by token, to be done again elsewhere.

Replaying the routing of a rollout keeps training and inference of a mixture together, whose routers
would otherwise choose other experts for rounding's sake (rollout routing replay: arXiv 2510.11370).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mpishard.errors import UserError

# Above every position, so that a request and a position make one number.
POSITIONS = 2**31


@dataclass(frozen=True)
class RoutingTrace:
    """The experts and weights of T tokens, by ascending request and position, each of these once.

    `where` names them in errors; `request_ids` are those of the requests, by their numbers.
    """

    request_T: np.ndarray  # the number of each token's request
    position_T: np.ndarray
    token_T: np.ndarray  # its id
    layers: tuple[int, ...]  # those with experts, L of them
    experts_TLA: np.ndarray  # ascending
    weights_TLA: np.ndarray  # what the experts' outputs are multiplied with
    request_ids: tuple[str, ...]
    where: str = "the recorded routing"

    def find(
        self, request_n: np.ndarray, position_n: np.ndarray, token_n: np.ndarray
    ) -> np.ndarray:
        """The places of tokens in the arrays: (n,). UserError for one that is not there, or was
        another."""
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
        """Those of the requests of these names, which are numbered as they come here. UserError
        for a name that is not among those of the requests."""
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
        """The same with other numbers of the requests, those below 0 left out."""
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
        """Whether some token is there twice, in arrays that are sorted."""
        return bool((np.diff(self._keys) == 0).any())

    @cached_property
    def _keys(self) -> np.ndarray:
        """One ascending number for each token's request and position."""
        return self.request_T * POSITIONS + self.position_T

    def _refuse(
        self, request_n: np.ndarray, position_n: np.ndarray, wrong_n: np.ndarray, what: str
    ) -> None:
        request, position = int(request_n[wrong_n][0]), int(position_n[wrong_n][0])
        name = self.request_ids[request] if request < len(self.request_ids) else str(request)
        raise UserError(f"{self.where} {what} position {position} of request {name!r}")
