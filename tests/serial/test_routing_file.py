"""Recorded routing as a file: read as written, put in order, and refused where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_config

from mpishard.errors import UserError
from mpishard.storage.routing_file import read_routing, write_routing
from mpishard.storage.routing_trace import RoutingTrace

CONFIG = tiny_config("qwen2_moe-mixed")  # 2 of 8 experts, in layer 1 of four
TOKENS = [(0, 0, 9), (0, 1, 8), (0, 2, 7), (1, 0, 9)]  # request, position, id


def decisions() -> RoutingTrace:
    request_T, position_T, token_T = np.array(TOKENS).T
    experts_TLA = np.array([[[0, 3]], [[1, 2]], [[6, 7]], [[2, 5]]])
    weights_TLA = experts_TLA / 16 + 0.25
    return RoutingTrace(
        request_T, position_T, token_T, (1,), experts_TLA, weights_TLA, ("a", "b"), "FILE"
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "routing"  # which does not end in .npz
    write_routing(path, decisions(), CONFIG)
    return path


def same(found: RoutingTrace, expected: RoutingTrace) -> bool:
    arrays = ("request_T", "position_T", "token_T", "experts_TLA", "weights_TLA")
    pairs = ((getattr(found, name), getattr(expected, name)) for name in arrays)
    return (
        all(np.array_equal(one, other) for one, other in pairs)
        and found.layers == expected.layers
        and found.request_ids == expected.request_ids
    )


def change(path: Path, about: Callable[[dict[str, Any]], None], **arrays: Any) -> None:
    """Writes the file again with other arrays, and with what `about` makes of the JSON object."""
    with np.load(path) as archive:
        content = dict(archive)
    description = json.loads(str(content["about"]))
    about(description)
    content |= {"about": np.array(json.dumps(description))} | arrays
    with path.open("wb") as file:
        np.savez(file, **content)


def test_it_is_read_as_it_was_written(path):
    assert same(read_routing(path, CONFIG, "FILE"), decisions())
    assert [file.name for file in path.parent.iterdir()] == ["routing"]


def test_tokens_and_experts_of_others_are_put_in_order(path):
    right, order = decisions(), [2, 3, 0, 1]
    change(
        path,
        lambda about: None,
        request=right.request_T[order].astype(np.int32),
        position=right.position_T[order],
        token=right.token_T[order],
        experts=right.experts_TLA[order][..., ::-1].astype(np.uint8),
        weights=right.weights_TLA[order][..., ::-1],
    )
    assert same(read_routing(path, CONFIG, "FILE"), right)


def test_requests_are_found_by_name():
    of = decisions().of(["b"])
    assert of.request_ids == ("b",) and of.token_T.tolist() == [9] and of.request_T.tolist() == [0]
    turned = decisions().of(["b", "a"])
    assert turned.request_T.tolist() == [0, 1, 1, 1]
    one = np.array([1])
    assert turned.experts_TLA[turned.find(one, one, np.array([8]))].tolist() == [[[1, 2]]]
    with pytest.raises(UserError, match="^FILE has no request 'c'; it has 'a', 'b'$"):
        decisions().of(["a", "c"])


def test_tokens_are_found_in_any_order():
    request_n, position_n, token_n = np.array(TOKENS)[[2, 0, 3, 2]].T
    assert decisions().find(request_n, position_n, token_n).tolist() == [2, 0, 3, 2]
    nothing = np.empty(0, np.int64)
    assert decisions().find(nothing, nothing, nothing).tolist() == []


@pytest.mark.parametrize(
    "token, sentence",
    [
        ((0, 3, 7), "FILE has nothing for position 3 of request 'a'"),
        ((1, 1, 9), "FILE has nothing for position 1 of request 'b'"),
        ((2, 0, 9), "FILE has nothing for position 0 of request '2'"),
        ((1, 0, 4), "FILE is of token 9, not 4, at position 0 of request 'b'"),
    ],
)
def test_tokens_that_are_not_there_or_others(token, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        decisions().find(*np.array([TOKENS[0], token]).T)


def nothing(about: dict[str, Any]) -> None:
    """The same."""


@pytest.mark.parametrize(
    "about, arrays, sentence",
    [
        (lambda a: a.update(format=0), {}, "\"format\" 0, it should be 'mpishard routing 1'"),
        (lambda a: a.update(top_k=3), {}, 'has the "top_k" 3, but the model\'s is 2'),
        (lambda a: a.update(experts=9), {}, 'has the "experts" 9, but the model\'s is 8'),
        (lambda a: a.update(layers=[0, 1]), {}, 'has the "layers" [0, 1], but the model\'s is [1]'),
        (lambda a: a.pop("model_type"), {}, "\"model_type\" None, but the model's is 'qwen2_moe'"),
        (lambda a: a.update(requests=[1]), {}, 'must have a list of texts as "requests", not [1]'),
        (lambda a: a.update(requests=900 * "x"), {}, f'as "requests", not \'{99 * "x"}…'),
        (
            lambda a: a.update(top_k=900 * "x"),
            {},
            f"has the \"top_k\" '{99 * 'x'}…, but the model's",
        ),
        (
            nothing,
            {"token": np.zeros(4)},
            "has float64 of shape (4,) as token, but they must be wh",
        ),
        (nothing, {"token": np.zeros(3, int)}, "whole numbers of shape (4,)"),
        (nothing, {"experts": np.zeros((4, 1, 3), int)}, "whole numbers of shape (4, 1, 2)"),
        (
            nothing,
            {"weights": np.zeros((4, 2), int)},
            "be floating-point numbers of shape (4, 1, 2)",
        ),
        (
            nothing,
            {"request": np.array([0, 1, 2, 0])},
            "among request that is not from 0 to below 2",
        ),
        (
            nothing,
            {"weights": np.full((4, 1, 2), np.nan)},
            "has a number among weights that is not",
        ),
        (
            nothing,
            {"experts": np.full((4, 1, 2), 8)},
            "among experts that is not from 0 to below 8",
        ),
        (nothing, {"experts": np.ones((4, 1, 2), int)}, "sends a token to the same expert twice"),
        (nothing, {"position": np.zeros(4, int)}, "FILE has a token twice"),
    ],
)
def test_what_does_not_fit(path, about, arrays, sentence):
    change(path, about, **arrays)
    with pytest.raises(UserError) as refusal:
        read_routing(path, CONFIG, "FILE")
    assert sentence in str(refusal.value) and str(refusal.value).startswith("FILE ")


def test_what_is_no_file_of_routing(path):
    with pytest.raises(UserError, match="^FILE cannot be read: No such file or directory$"):
        read_routing(path.with_name("other"), CONFIG, "FILE")
    damaged = path.read_bytes()[:-100]
    for content in (damaged, b"", b"text", b"[]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="^FILE (is not a recorded routing|cannot be read): "):
            read_routing(path, CONFIG, "FILE")
    with path.open("wb") as file:
        np.savez(file, about=np.array("[" * 99999))
    with pytest.raises(UserError, match="nested more than 64 levels deep"):
        read_routing(path, CONFIG, "FILE")
    with path.open("wb") as file:
        np.savez(file, about=np.array("[]"))
    with pytest.raises(UserError, match="^FILE is not a recorded routing: "):
        read_routing(path, CONFIG, "FILE")


def test_however_an_archive_is_damaged_it_is_one_sentence(path):
    """A byte at a time, wherever zip files and NumPy's headers have theirs."""
    with np.load(path) as archive:
        np.savez_compressed(path, **archive)
    sound = path.read_bytes()
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x41]) + sound[place + 1 :])
        with suppress(UserError):
            read_routing(path, CONFIG, "FILE")


def test_a_token_that_is_there_twice_is_noticed():
    right = decisions()
    assert not right.has_duplicates()
    assert replace(right, position_T=np.array([0, 0, 2, 0])).has_duplicates()
