"""Recorded routing as a file: an .npz archive, which NumPy opens without this package.

============  ===============  ==============  =====================================================
array         shape            type
============  ===============  ==============  =====================================================
``about``     ()               string          a JSON object: ``format``, ``model_type``,
                                               ``experts`` and ``top_k`` of the model, ``layers``
                                               (the L with experts), ``requests`` (their ids)
``request``   (T,)             int64           the index of the token's request in ``requests``
``position``  (T,)             int64           the position of the token in its request
``token``     (T,)             int64           the token's id
``experts``   (T, L, A)        int64           the experts of the token, ascending
``weights``   (T, L, A)        float           the factors of their outputs
============  ===============  ==============  =====================================================

Tokens are sorted by request and position, without duplicates. The last token of a request is chosen
but never processed, and so has no experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mpishard.config.model_config import ModelConfig
from mpishard.errors import UserError, brief
from mpishard.storage.output_file import whole_file
from mpishard.storage.parsing import parse_json
from mpishard.storage.routing_trace import POSITIONS, RoutingTrace

FORMAT = "mpishard routing 1"
ARRAYS = ("request", "position", "token", "experts", "weights")


def write_routing(path: Path, trace: RoutingTrace, config: ModelConfig) -> None:
    """Writes the file, under another name until it is complete. Raises OSError if that fails."""
    about = json.dumps(_about(config) | {"requests": trace.request_ids})
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            about=np.array(about),
            request=trace.request_T,
            position=trace.position_T,
            token=trace.token_T,
            experts=trace.experts_TLA,
            weights=trace.weights_TLA,
        )


def read_routing(path: Path, config: ModelConfig, where: str) -> RoutingTrace:
    """The routing in a file, with tokens and their experts sorted. Raises a UserError that begins
    with `where` if the file is damaged, of another format or of another model."""
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
    trace = RoutingTrace(
        request_T=arrays["request"].astype(np.int64),
        position_T=arrays["position"].astype(np.int64),
        token_T=arrays["token"].astype(np.int64),
        layers=tuple(about["layers"]),
        experts_TLA=np.take_along_axis(arrays["experts"].astype(np.int64), ascending, axis=2),
        weights_TLA=np.take_along_axis(arrays["weights"], ascending, axis=2),
        request_ids=tuple(request_ids),
        where=where,
    )
    trace = trace.sorted_as(trace.request_T, trace.request_ids)
    if (np.diff(trace.experts_TLA, axis=2) == 0).any():
        raise UserError(f"{where} sends a token to the same expert twice")
    if trace.has_duplicates():
        raise UserError(f"{where} has a token twice")
    return trace


def _check_arrays(
    arrays: dict[str, np.ndarray], config: ModelConfig, requests: int, where: str
) -> None:
    """Refuse arrays of a wrong shape or type, and numbers out of range (UserError)."""
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
    except Exception as error:  # a damaged archive makes NumPy and zipfile raise anything
        problem = brief(f"{type(error).__name__}: {error}")
        raise UserError(f"{where} is not a recorded routing: {problem}") from None
