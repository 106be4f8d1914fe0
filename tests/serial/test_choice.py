"""Candidates, filters and noise, each against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpishard.arithmetic.sampling import gumbel, logsumexp, num_kept, row_topk
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError


@pytest.mark.parametrize("columns", [1, 4, 9])
@pytest.mark.parametrize("count", [1, 3, 9, 12])
def test_best_of_each_row(columns: int, count: int):
    keys_Mv = np.random.RandomState(2).randint(0, 4, (20, columns)).astype(float)  # many ties
    best_MC, column_MC = row_topk(keys_Mv, count)
    for keys_v, best_C, column_C in zip(keys_Mv, best_MC, column_MC, strict=True):
        order = np.argsort(-keys_v, kind="stable")[:count]
        missing = count - len(order)
        np.testing.assert_array_equal(best_C, [*keys_v[order], *[-np.inf] * missing])
        np.testing.assert_array_equal(column_C, [*order, *[columns] * missing])


def test_best_of_rows_without_columns():
    best_MC, column_MC = row_topk(np.empty((2, 0)), 3)
    assert (best_MC == -np.inf).all() and (column_MC == 0).all()


@pytest.mark.parametrize("count", [1, 3, 9, 12])
@pytest.mark.parametrize("odd", [1, 2, 8, 9])
def test_a_row_with_keys_that_are_not_numbers_says_so_at_once(odd: int, count: int):
    keys_Mv = np.arange(18.0).reshape(2, 9)
    keys_Mv[1, 9 - odd :] = np.nan
    best_MC, column_MC = row_topk(keys_Mv, count)
    assert best_MC[0, 0] == 8 and column_MC[0, 0] == 8
    assert np.isnan(best_MC[1, 0]) and np.isnan(keys_Mv[1, column_MC[1, 0]])


def test_log_sum_exp():
    keys_Mv = np.array([[0.0, 0.0], [1000.0, 1000.0], [-np.inf, 3.0], [-np.inf, -np.inf]])
    expected = [np.log(2), 1000 + np.log(2), 3, -np.inf]
    np.testing.assert_allclose(logsumexp(keys_Mv), expected)
    np.testing.assert_array_equal(logsumexp(np.empty((2, 0))), [-np.inf, -np.inf])


PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.06, 0.04])


@pytest.mark.parametrize(
    "top_k, top_p, min_p, number",
    [
        (0, 1.0, 0.0, 5),
        (2, 1.0, 0.0, 2),
        (9, 1.0, 0.0, 5),
        (0, 0.69, 0.0, 2),
        (0, 0.71, 0.0, 3),
        (0, 1e-9, 0.0, 1),
        (2, 0.58, 0.0, 2),  # of the two largest, 0.4 is 4/7: not yet 0.58
        (2, 0.57, 0.0, 1),
        (0, 1.0, 0.51, 2),
        (0, 1.0, 0.49, 3),
        (0, 1.0, 1.0, 1),
        (4, 0.99, 0.6, 2),
    ],
)
def test_kept(top_k: int, top_p: float, min_p: float, number: int):
    assert num_kept(np.log(PROBABILITIES), 0.0, top_k, top_p, min_p, complete=True) == number


@pytest.mark.parametrize(
    "top_k, top_p, min_p, number",
    [
        (0, 0.5, 0, 2),
        (0, 0.9, 0, None),
        (2, 1, 0, 2),
        (3, 1, 0, None),
        (0, 1, 0.9, 1),
        (0, 1, 0, None),
    ],
)
def test_kept_of_only_the_first_keys(top_k, top_p, min_p, number):
    """None where it depends on keys that are not there."""
    assert num_kept(np.log(PROBABILITIES[:2]), 0.0, top_k, top_p, min_p, complete=False) == number


def test_noise_belongs_to_the_token():
    """Whichever tokens are asked for together, and nothing else changes it."""
    ids = np.arange(1000)
    noise = gumbel(1, 2, 3, ids)
    np.testing.assert_array_equal(gumbel(1, 2, 3, ids[500:]), noise[500:])
    np.testing.assert_array_equal(gumbel(1, 2, 3, ids[::-7]), noise[::-7])
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.isin(gumbel(*other, ids), noise).any()


def test_noise_is_gumbel_distributed():
    """Mean 0.5772, variance pi**2 / 6, and the distribution function at a few places."""
    noise = np.concatenate([gumbel(0, 0, position, np.arange(1000)) for position in range(200)])
    assert noise.mean() == pytest.approx(0.57722, abs=0.015)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.04)
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert (noise < x).mean() == pytest.approx(np.exp(-np.exp(-x)), abs=0.006)


def test_noise_is_the_same_on_every_machine():
    """Integer arithmetic makes it; these values are part of what a seed promises."""
    found = gumbel(7, 1, 2, np.array([0, 5]))
    np.testing.assert_allclose(found, [0.8842925110, 1.4982073600], atol=1e-9)
    np.testing.assert_array_equal(gumbel(7, 1, 2, np.array([0, 5]), choice=0), found)
    others = [gumbel(7, 1, 2, np.array([0, 5]), choice) for choice in range(4)]
    assert len(np.unique(others)) == 8, "each answer of a request has noise of its own"


def test_unless_told_otherwise_sampling_is_greedy_unfiltered_and_ends_with_the_text():
    params = SamplingParams()
    assert params.greedy and not params.filtered and not SamplingParams(temperature=1).filtered
    assert (params.seed, params.max_tokens, params.stop) == (0, 128, ())
    assert not params.ignore_eos and not params.processes_logits
    assert (params.logprobs, params.n) == (None, 1)


def test_values_that_mean_none_are_none():
    assert SamplingParams(top_k=-1, seed=-1) == SamplingParams()
    assert SamplingParams(temperature=1, top_p=0).greedy
    bias = SamplingParams(logit_bias={9: 1, 2: -1})
    assert bias == SamplingParams(logit_bias=[(2, -1), (9, 1)]) and hash(bias)
    assert bias.logit_bias == ((2, -1.0), (9, 1.0)) and bias.processes_logits


@pytest.mark.parametrize(
    "field, value, right",
    [
        ("temperature", -0.1, "0 (greedy) or at least 1e-6"),
        ("temperature", float("nan"), "0 (greedy) or at least 1e-6"),
        ("temperature", float("inf"), "0 (greedy) or at least 1e-6"),
        ("temperature", 1e-310, "0 (greedy) or at least 1e-6"),
        ("top_k", -2, "0 or -1 (no filter), or more"),
        ("top_p", -0.01, "0 to 1"),
        ("top_p", 1.01, "0 to 1"),
        ("min_p", -0.5, "0 to 1"),
        ("min_p", 1.5, "0 to 1"),
        ("seed", -2, "0 to 2**64 - 1, or -1 for none"),
        ("repetition_penalty", 0, "1e-6 to 1e6 (1: none)"),
        ("repetition_penalty", float("inf"), "1e-6 to 1e6 (1: none)"),
        ("presence_penalty", -2.1, "-2 to 2"),
        ("frequency_penalty", float("nan"), "-2 to 2"),
        ("logprobs", 21, "0 (of the chosen token alone) to 20"),
        ("logprobs", -1, "0 (of the chosen token alone) to 20"),
        ("n", 0, "1 to 128"),
        ("n", 129, "1 to 128"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any, right: str):
    with pytest.raises(UserError) as refused:
        SamplingParams(**{field: value})
    assert str(refused.value) == f"{field} {value} is out of range: it must be {right}"
