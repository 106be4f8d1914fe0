"""The tokens that a sequence begins with: the decoder's, and those that an encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mpishard.config.model_config import ModelConfig
from mpishard.errors import UserError


class TokenInput(NamedTuple):
    """The `ids` that a decoder goes on from, and the `encoder_ids` that its encoder reads, none
    without an encoder."""

    ids: list[int]
    encoder_ids: list[int] = []  # noqa: RUF012 (never changed)

    @property
    def prompt(self) -> list[int]:
        """What was given as prompt."""
        return self.encoder_ids or self.ids


def token_input(
    config: ModelConfig, ids: list[int], decoder_ids: Sequence[int] | None, what: str
) -> TokenInput:
    """What a model makes of the prompt `ids`: an encoder reads it, and its decoder goes on from
    `decoder_ids`, which are the token that it begins with unless given. `what` names the prompt in
    a UserError, for `decoder_ids` of a model without an encoder."""
    if config.encoder is None:
        if decoder_ids is not None:
            raise UserError(
                f"{what} has decoder_input_ids, but a {config.family} model has no encoder that "
                "would read the other ids: leave them out"
            )
        return TokenInput(ids)
    assert config.decoder_start_id is not None, "the configuration has the decoder's first token"
    begin = [config.decoder_start_id] if decoder_ids is None else list(decoder_ids)
    return TokenInput(begin, ids)
