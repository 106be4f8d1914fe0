"""Recorded routing as a file: an .npz archive, which NumPy opens without this package.

============  ===============  ==============  =====================================================
array         shape            type
============  ===============  ==============  =====================================================
``about``     ()               string          a JSON object: ``format``, ``model_type``,
                                               ``experts`` and ``top_k`` of the model, ``layers``
                                               (the L that have experts), ``requests`` (their ids)
``request``   (T,)             int64           the place of a token's request in ``requests``
``position``  (T,)             int64           the token's position in it
``token``     (T,)             int64           the token's id
``experts``   (T, L, A)        int64           the experts of the token, ascending
``weights``   (T, L, A)        float           what their outputs are multiplied with
============  ===============  ==============  =====================================================

Tokens come by request and position, each once. A token that was chosen last is never fed, and so
has no experts.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mpishard.config.model_config import ModelConfig
from mpishard.errors import UserError, brief
from mpishard.storage.parsing import parse_json
from mpishard.storage.routing_trace import POSITIONS, RoutingTrace

FORMAT = "mpishard routing 1"
ARRAYS = ("request", "position", "token", "experts", "weights")


def write_routing(path: Path, decisions: RoutingTrace, config: ModelConfig) -> None:
    """Writes the file, which bears another name until it is complete. OSError if it cannot."""
    about = json.dumps(_about(config) | {"requests": decisions.request_ids})
    temporary = path.with_name(path.name + ".incomplete")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                about=np.array(about),
                request=decisions.request_T,
                position=decisions.position_T,
                token=decisions.token_T,
                experts=decisions.experts_TLA,
                weights=decisions.weights_TLA,
            )
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_routing(path: Path, config: ModelConfig, where: str) -> RoutingTrace:
    """What the file says; UserError, that begins with `where`, if it is none, damaged, or of
    another model. Whoever wrote it, its tokens and their experts are put in order."""
    about, arrays = _read(path, where)
    for field, right in _about(config).items():
        if about.get(field) != right:
            of = "it should be" if field == "format" else "but the model's is"
            found = brief(repr(about.get(field)))
            raise UserError(f'{where} has the "{field}" {found}, {of} {right!r}')
    request_ids = about.get("requests")
    if not isinstance(request_ids, list) or not all(isinstance(name, str) for name in request_ids):
        found = brief(repr(request_ids))
        raise UserError(f'{where} must have a list of texts as "requests", not {found}')
    _check_arrays(arrays, config, len(request_ids), where)
    ascending = np.argsort(arrays["experts"], axis=2, kind="stable")
    decisions = RoutingTrace(
        request_T=arrays["request"].astype(np.int64),
        position_T=arrays["position"].astype(np.int64),
        token_T=arrays["token"].astype(np.int64),
        layers=tuple(about["layers"]),
        experts_TLA=np.take_along_axis(arrays["experts"].astype(np.int64), ascending, axis=2),
        weights_TLA=np.take_along_axis(arrays["weights"], ascending, axis=2),
        request_ids=tuple(request_ids),
        where=where,
    )
    decisions = decisions.sorted_as(decisions.request_T, decisions.request_ids)
    if (np.diff(decisions.experts_TLA, axis=2) == 0).any():
        raise UserError(f"{where} sends a token to the same expert twice")
    if decisions.has_duplicates():
        raise UserError(f"{where} has a token twice")
    return decisions


def _check_arrays(
    arrays: dict[str, np.ndarray], config: ModelConfig, requests: int, where: str
) -> None:
    """Refuse arrays of another shape or type, and numbers that mean nothing (UserError)."""
    moe, T = config.moe, len(np.atleast_1d(arrays["request"]))
    assert moe is not None
    each = (T, sum(moe.layers), moe.top_k)
    for name, shape, kinds, end in (
        ("request", (T,), "iu", requests),
        ("position", (T,), "iu", POSITIONS),
        ("token", (T,), "iu", config.vocab),
        ("experts", each, "iu", moe.num_experts),
        ("weights", each, "f", np.inf),
    ):
        array = arrays[name]
        if array.shape != shape or array.dtype.kind not in kinds:
            right = "floating-point" if kinds == "f" else "whole"
            raise UserError(
                f"{where} has {array.dtype} of shape {array.shape} as {name}, but they must be "
                f"{right} numbers of shape {shape}"
            )
        if not ((array >= 0) & (array < end)).all():
            raise UserError(f"{where} has a number among {name} that is not from 0 to below {end}")


def _about(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None, "a model without experts has no routing"
    return {
        "format": FORMAT,
        "model_type": config.family,
        "experts": moe.num_experts,
        "top_k": moe.top_k,
        "layers": [layer for layer, is_moe_layer in enumerate(moe.layers) if is_moe_layer],
    }


def _read(path: Path, where: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            about = parse_json(str(archive["about"][()]))
            return dict(about), {name: archive[name] for name in ARRAYS}
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of a damaged archive NumPy and zipfile make anything
        problem = brief(f"{type(error).__name__}: {error}")
        raise UserError(f"{where} is not a recorded routing: {problem}") from None
