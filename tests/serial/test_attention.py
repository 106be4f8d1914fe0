"""Attention against explicit loops, over positions, windows and groups of heads, and the merging of
attention over parts of the keys."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpishard.arithmetic import alibi, attention
from mpishard.arithmetic.alibi import LinearBiases, alibi_slopes
from mpishard.arithmetic.attention import AttentionSpec, attend, merge_attn_states, merge_weights

pytestmark = pytest.mark.filterwarnings("error")

BLOCKS = ("QUERY_ROWS", "KEY_BLOCK", "DIAGONAL_BLOCK", "CACHED_SCORES", "SMALL_GEMM_SIZE")

# Name: (positions of the queries, positions of the keys).
POSITIONS = {
    "one": ([0], [0]),
    "one at the end": ([8], range(9)),
    "one among many": ([4], range(9)),
    "one before all": ([4], range(5, 9)),
    "whole": (range(10), range(10)),
    "contiguous tail": (range(7, 11), range(11)),
    "every third key": (range(6, 12), range(1, 12, 3)),
    "every fourth query": (range(3, 40, 4), range(40)),
    "interleaved with each other": (range(0, 18, 2), range(1, 18, 2)),
    "zigzag": ([*range(3, 6), *range(18, 21)], [*range(3), *range(21, 24)]),
    "zigzag over itself": ([*range(3, 6), *range(18, 21)], [*range(3, 6), *range(18, 21)]),
    "far from the keys": (range(30, 36), range(5)),
    "no key seen": (range(5), range(5, 9)),
    "some see keys": (range(2, 9), range(5, 9)),
    "irregular": ([0, 1, 5, 6, 13, 20, 21], [1, 2, 6, 7, 8, 19, 21, 30]),
    "no query": ([], range(4)),
    "no key": (range(4), []),
    "one without keys": ([3], []),
    "nothing": ([], []),
}


REACHES: list[dict[str, int]] = [
    *({"window": window} for window in (1, 2, 5, 100)),
    *({"chunk": chunk} for chunk in (1, 4, 7)),
]


def plain(q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec):
    """One query, one head, one key at a time."""
    S, h, _ = q_ShK.shape
    out_ShK, lse_Sh = np.zeros_like(q_ShK), np.full((S, h), -np.inf)
    for s, p in enumerate(q_pos_S):
        seen = [
            i
            for i, t in enumerate(k_pos_T)
            if t <= p
            and (not spec.window or t > p - spec.window)
            and (not spec.chunk or t // spec.chunk == p // spec.chunk)
        ]
        if not seen:
            continue
        for head in range(h):
            group = head // (h // len(k_gTK))
            scores = np.array([spec.scale * q_ShK[s, head] @ k_gTK[group, i] for i in seen])
            if spec.softcap is not None:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            if spec.biases is not None:
                slope = spec.biases.scale * spec.biases.slopes_h[head]
                scores += [slope * (k_pos_T[i] - p) for i in seen]
            weights = np.exp(scores - scores.max())
            out_ShK[s, head] = weights @ v_gTK[group, seen] / weights.sum()
            lse_Sh[s, head] = scores.max() + np.log(weights.sum())
    return out_ShK, lse_Sh


def arrays(q_at, k_at, h=6, g=2, K=5, size=1.0, window=None, softcap=None, chunk=None) -> Any:
    """Random queries with the positions of queries and keys, and keys and values that are part of
    larger arrays, as `attend` takes them; `size` scales queries and keys."""
    random = np.random.RandomState(0)
    q_ShK = size * random.standard_normal((len(q_at), h, K))
    k_gTK, v_gTK = random.standard_normal((2, g + 1, len(k_at) + 3, K))[:, 1:, : len(k_at)]
    spec = AttentionSpec(0.4, window, softcap, chunk=chunk)
    return q_ShK, np.array(q_at, int), size * k_gTK, v_gTK, np.array(k_at, int), spec


def in_float32(q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec) -> Any:
    q_ShK, k_gTK, v_gTK = (array.astype(np.float32) for array in (q_ShK, k_gTK, v_gTK))
    return q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec


def assert_close(found, expected, rtol=0.0, atol=1e-12):
    for array, right in zip(found, expected, strict=True):
        assert array.shape == right.shape
        np.testing.assert_allclose(array, right, rtol, atol)


@pytest.mark.parametrize("reach", [{}, *REACHES])
@pytest.mark.parametrize("positions", POSITIONS)
def test_attend(monkeypatch, reach, positions):
    # With the larger scores some blocks of queries need a shift.
    for h, g, size in [(4, 4, 1.0), (6, 2, 1.0), (3, 1, 1.0), (6, 2, 6.0)]:
        case = arrays(*POSITIONS[positions], h, g, size=size, **reach)
        capped = arrays(*POSITIONS[positions], h, g, size=size, softcap=1.5 * size, **reach)
        *rest, spec = case
        biased = *rest, replace(spec, biases=LinearBiases(0.9 ** np.arange(h), scale=0.3))
        for one in (case, capped, biased):
            expected = plain(*one)
            assert_close(attend(*one), expected, atol=1e-12 * size**2)
            for block in (1, 3):
                with monkeypatch.context() as patched:
                    for name in BLOCKS:
                        patched.setattr(attention, name, block)
                    assert_close(attend(*one), expected, atol=1e-12 * size**2)


@pytest.mark.parametrize("blocks", [(4, 4, 4), (64, 16, 16), (64, 16, 8), (1024, 256, 128)])
@pytest.mark.parametrize("reach", [{}, {"window": 3}, {"window": 70}, {"chunk": 40}])
def test_many_queries_and_keys_in_blocks_of_all_kinds(monkeypatch, blocks, reach):
    for name, block in zip(BLOCKS, blocks, strict=False):
        monkeypatch.setattr(attention, name, block)
    case = arrays(range(0, 160, 2), range(5, 150), h=2, g=1, **reach)
    assert_close(attend(*case), plain(*case))


def test_several_heads_of_a_single_query_over_more_keys_than_one_small_product(monkeypatch):
    monkeypatch.setattr(attention, "SMALL_GEMM_SIZE", 6 * 5 * 4)
    case = arrays([50], range(47), h=6, g=1)
    assert_close(attend(*case), plain(*case))


@pytest.mark.parametrize("positions", ["one at the end", "whole", "zigzag", "some see keys"])
def test_float32_stays_float32_and_close(positions):
    case = arrays(*POSITIONS[positions])
    found = attend(*in_float32(*case))
    assert all(array.dtype == np.float32 for array in found)
    assert_close(found, plain(*case), atol=1e-5)


@pytest.mark.parametrize("S", [1, 2])
@pytest.mark.parametrize("score", [-160_000, -100, 100, 160_000])
def test_large_scores_neither_overflow_nor_vanish(S, score):
    q_ShK = np.full((S, 1, 4), 200, np.float32)
    k_gTK = np.full((1, 3, 4), score / 800, np.float32)
    v_gTK = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    out_ShK, lse_Sh = attend(
        q_ShK, np.arange(5, 5 + S), k_gTK, v_gTK, np.arange(3), AttentionSpec(1.0)
    )
    np.testing.assert_allclose(out_ShK, np.broadcast_to(v_gTK[0, 1], (S, 1, 4)), rtol=1e-6)
    np.testing.assert_allclose(lse_Sh, score + np.log(3), rtol=1e-6)


@pytest.mark.parametrize(
    "positions, size, expected",
    [
        ("whole", 1.0, [False] * 5),
        ("some see keys", 1.0, [False] * 4),
        ("whole", 30.0, [False, True, True, True, True, True]),
        ("no key seen", 30.0, [False] * 3),
    ],
)
def test_only_blocks_with_bad_sums_are_taken_again(monkeypatch, positions, size, expected):
    sums, shifts = attention._sums, []

    def recorded(*block: Any, **shift: Any) -> Any:
        shifts.append(shift["shifted"])
        return sums(*block, **shift)

    monkeypatch.setattr(attention, "_sums", recorded)
    monkeypatch.setattr(attention, "QUERY_ROWS", 2)
    attend(*arrays(*POSITIONS[positions], h=1, g=1, size=size))
    assert shifts == expected


def test_the_scores_of_one_query_do_not_drown_those_of_another():
    case = arrays(range(8), range(8), h=2, g=1)
    case[0][3] *= 1000
    case[0][5] *= 1e-3
    assert_close(attend(*case), plain(*case), rtol=1e-12)


def test_keys_that_no_query_sees_are_not_read():
    case = arrays([20, 21, 22], range(40), window=4)
    k_gTK, v_gTK = case[2:4]
    expected = attend(*case)
    for array in (k_gTK, v_gTK):
        array[:, :17] = array[:, 23:] = np.nan
    assert_close(attend(*case), expected)


def test_keys_between_what_two_queries_see_are_not_read(monkeypatch):
    for name in ("KEY_BLOCK", "DIAGONAL_BLOCK"):
        monkeypatch.setattr(attention, name, 10)
    case = arrays([5, 95], range(100), window=4)
    expected = attend(*case)
    for array in case[2:4]:
        array[:, 6:86] = np.nan  # 86 to 95 are one block
    assert_close(attend(*case), expected)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("S", [1, 12])
def test_merge_of_any_split_of_the_keys_is_the_whole(window, S):
    case = arrays(range(24 - S, 24), range(24), window=window)
    q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec = case
    random = np.random.RandomState(1)
    splits = [k_pos_T < cut for cut in (0, 1, 11, 23, 24)] + [k_pos_T % 4 == 1]
    splits += [random.rand(24) < 0.5 for _ in range(4)]
    for ours_T in splits:
        parts = [
            attend(q_ShK, q_pos_S, k_gTK[:, some], v_gTK[:, some], k_pos_T[some], spec)
            for some in (ours_T, ~ours_T)
        ]
        assert_close(merge_attn_states(*parts[0], *parts[1]), attend(*case))


def test_merge_with_nothing_changes_no_bit():
    out_ShK, lse_Sh = attend(*arrays(range(6), range(6)))
    nothing = np.zeros_like(out_ShK), np.full_like(lse_Sh, -np.inf)
    for merged in (
        merge_attn_states(out_ShK, lse_Sh, *nothing),
        merge_attn_states(*nothing, out_ShK, lse_Sh),
    ):
        assert_close(merged, (out_ShK, lse_Sh), atol=0)
    assert_close(merge_attn_states(*nothing, *nothing), nothing, atol=0)


def test_merge_of_far_apart_log_sum_exps():
    one, far = np.ones((1, 1, 1), np.float32), np.full((1, 1), 3e4, np.float32)
    assert_close(merge_attn_states(one, far, 2 * one, -far), (one, far), atol=0)
    assert_close(
        merge_attn_states(one, far, 2 * one, far), (1.5 * one, far + np.float32(np.log(2)))
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shares(dtype):
    lse_RSh = np.array(
        [[[0.0, 500, -np.inf]], [[np.log(3), 500, -np.inf]], [[-np.inf, -500, -np.inf]]]
    )
    share_RSh, lse_Sh = merge_weights(lse_RSh.astype(dtype))
    assert share_RSh.dtype == lse_Sh.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(share_RSh[:, 0, 0], [0.25, 0.75, 0], atol=eps)
    np.testing.assert_array_equal(share_RSh[:, 0, 1], [0.5, 0.5, 0])
    np.testing.assert_array_equal(share_RSh[:, 0, 2], 0)
    np.testing.assert_allclose(lse_Sh, [[np.log(4), 500 + np.log(2), -np.inf]], rtol=2 * eps)


def test_shares_of_one_set_are_its_own():
    lse_1Sh = np.array([[[3.5, -np.inf]]])
    share_1Sh, lse_Sh = merge_weights(lse_1Sh)
    np.testing.assert_array_equal(share_1Sh, [[[1, 0]]])
    np.testing.assert_array_equal(lse_Sh, lse_1Sh[0])


@pytest.mark.parametrize("size", [1.0, 10.0])
def test_memory_is_far_below_a_matrix_of_scores(size):
    S, h = 4096, 2
    case = in_float32(*arrays(range(S), range(S), h, 1, 8, size))
    tracemalloc.start()
    try:
        attend(*case)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < h * S * S * 4 / 30


def test_slopes_of_heads_that_are_a_power_of_two_and_of_others():
    """Those of section 3 of arXiv 2108.12409, and how the published models go on from there."""
    eight = [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(8).tolist() == eight
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]
    assert alibi_slopes(6).tolist() == [2.0**-n for n in (2, 4, 6, 8, 1, 3)]
    assert alibi_slopes(1).tolist() == [2.0**-8]


def test_biases_of_some_heads_are_those_of_the_whole():
    q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec = arrays(range(9), range(9), h=6, g=3)
    spec = replace(spec, biases=LinearBiases(alibi_slopes(6)))
    whole, _ = attend(q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec)
    part, _ = attend(
        q_ShK[:, 2:4], q_pos_S, k_gTK[1:2], v_gTK[1:2], k_pos_T, spec.of_heads(slice(2, 4))
    )
    np.testing.assert_allclose(part, whole[:, 2:4], rtol=0, atol=1e-12)


def test_rounding_is_that_of_bfloat16():
    x = np.concatenate([np.arange(600), 0.7 ** np.arange(40), [0.0, -3.14159, 2.0**-100]])
    expected = x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float)
    np.testing.assert_array_equal(alibi.round_to_bfloat16(x.astype(np.float32)), expected)


def test_rounded_biases_do_not_depend_on_how_the_keys_are_cut():
    """Of a bfloat16 product of slope and position, positions beyond 256 are rounded too."""
    q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec = arrays(range(250, 260), range(260), h=4, g=2)
    spec = replace(spec, biases=LinearBiases(0.7 ** np.arange(4), scale=0.4, rounded=True))
    whole = attend(q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec)
    cuts = [slice(0, None, 2), slice(1, None, 2)]
    parts = [
        attend(q_ShK, q_pos_S, k_gTK[:, cut], v_gTK[:, cut], k_pos_T[cut], spec) for cut in cuts
    ]
    assert_close(merge_attn_states(*parts[0], *parts[1]), whole)
    spec = replace(spec, biases=LinearBiases(0.7 ** np.arange(4), scale=0.4))
    exact, _ = attend(q_ShK, q_pos_S, k_gTK, v_gTK, k_pos_T, spec)
    assert np.abs(exact - whole[0]).max() > 1e-3
