"""Tokens sampled from logits that are sharded over ranks, against tokens sampled from whole logits
in plain NumPy, with the filters that transformers defines."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from mpi4py import MPI
from toys import meshes

from mpishard.arithmetic.sampling import gumbel
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block
from mpishard.engine.sampling import NO_TOKEN, SamplingRow, sample
from mpishard.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.ranks

VOCAB = 301


def logits(flatness: float) -> np.ndarray:
    """(M, V) logits; a smaller `flatness` makes them flatter."""
    return flatness * np.random.RandomState(1).standard_normal((6, VOCAB))


def shards(comm: MPI.Intracomm, logits_MV: np.ndarray) -> Iterator[tuple[Mesh, np.ndarray]]:
    """Each mesh with this rank's block of the vocabulary."""
    for mesh in meshes(comm, "llama-mha"):
        mine = block(logits_MV.shape[1], mesh.tp.size, mesh.tp.rank)
        yield mesh, np.ascontiguousarray(logits_MV[:, mine])


def plain_sample(logits_V: np.ndarray, row: SamplingRow) -> int:
    """The token of one row of whole logits: each filter is a pass over sorted probabilities."""
    params = row.params
    if params.greedy:
        return int(np.argmax(logits_V))
    scores_V = logits_V.astype(np.float64) / params.temperature
    order = np.argsort(-scores_V, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    p = np.exp(scores_V[order] - scores_V.max())
    before = np.cumsum(p / p.sum()) - p / p.sum()
    order = order[before < params.top_p]
    p = np.exp(scores_V[order] - scores_V.max())
    order = order[p >= params.min_p * p.max()]
    noise = gumbel(params.seed, row.request, row.position, order)
    return int(order[np.argmax(scores_V[order] + noise)])


@pytest.mark.parametrize("flatness", [0.01, 1.0, 10.0])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=1),
        SamplingParams(temperature=1.3, top_k=40),
        SamplingParams(temperature=1, top_k=1000),
        SamplingParams(temperature=0.9, top_p=0.3),
        SamplingParams(temperature=1, top_p=0.95),
        SamplingParams(temperature=1, top_p=1e-9),
        SamplingParams(temperature=0.5, min_p=0.2),
        SamplingParams(temperature=1, min_p=1),
        SamplingParams(temperature=2, top_k=50, top_p=0.8, min_p=0.05),
        SamplingParams(temperature=1, top_p=0.9, min_p=0.01),
    ],
    ids=str,
)
def test_the_choice_is_that_of_the_whole_vocabulary(
    comm: MPI.Intracomm, sampling: SamplingParams, flatness: float
):
    logits_MV = logits(flatness)
    rows = [SamplingRow(sampling, request, 40 + request) for request in range(len(logits_MV))]
    expected = [plain_sample(logits_V, row) for logits_V, row in zip(logits_MV, rows, strict=True)]
    for mesh, logits_Mv in shards(comm, logits_MV):
        assert sample(logits_Mv, rows, VOCAB, mesh) == expected


def test_sequences_of_one_step_may_be_sampled_differently(comm: MPI.Intracomm):
    logits_MV = logits(0.1)
    ways = [
        SamplingParams(),
        SamplingParams(temperature=1),
        SamplingParams(temperature=1, top_k=7),
        SamplingParams(temperature=1, top_p=0.99),
        SamplingParams(temperature=0.1, min_p=0.5),
        SamplingParams(),
    ]
    rows = [SamplingRow(sampling, 0, position) for position, sampling in enumerate(ways)]
    expected = [plain_sample(logits_V, row) for logits_V, row in zip(logits_MV, rows, strict=True)]
    for mesh, logits_Mv in shards(comm, logits_MV):
        assert sample(logits_Mv, rows, VOCAB, mesh) == expected


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1, top_k=1)])
def test_equal_logits_go_to_the_lowest_id(comm: MPI.Intracomm, sampling: SamplingParams):
    logits_MV = np.zeros((3, VOCAB), np.float32)
    logits_MV[1, [100, 200, 300]] = 1
    logits_MV[2, -1] = 1
    rows = [SamplingRow(sampling, 0, 0)] * 3
    for mesh, logits_Mv in shards(comm, logits_MV):
        assert sample(logits_Mv, rows, VOCAB, mesh) == [0, 100, VOCAB - 1]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=1),
        SamplingParams(temperature=1, top_k=1),
        SamplingParams(temperature=1, top_k=40),
        SamplingParams(temperature=1, top_p=0.9),
        SamplingParams(temperature=1, min_p=0.1),
    ],
    ids=str,
)
def test_there_is_no_token_where_logits_are_not_finite(
    comm: MPI.Intracomm, sampling: SamplingParams
):
    """One logit of a row or all of them; the other rows get their tokens."""
    logits_MV = logits(1.0)
    for row, (odd, columns) in enumerate(
        [(np.nan, [7]), (np.inf, [VOCAB - 1]), (np.nan, range(VOCAB)), (-np.inf, range(VOCAB))]
    ):
        logits_MV[row, columns] = odd
    rows = [SamplingRow(sampling, request, 40) for request in range(len(logits_MV))]
    finite = [plain_sample(logits_MV[row], rows[row]) for row in (4, 5)]
    for mesh, logits_Mv in shards(comm, logits_MV):
        assert sample(logits_Mv, rows, VOCAB, mesh) == [NO_TOKEN] * 4 + finite


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_vocabulary_smaller_than_the_ranks(comm: MPI.Intracomm, top_k: int):
    """Some ranks hold no token at all."""
    logits_MV = np.array([[0.0, 3.0, 1.0]])
    sampling = SamplingParams(temperature=1e-3, top_k=top_k)
    for mesh, logits_Mv in shards(comm, logits_MV):
        assert sample(logits_Mv, [SamplingRow(sampling, 0, 0)], 3, mesh) == [1]
        assert sample(logits_Mv, [SamplingRow(SamplingParams(), 0, 0)], 3, mesh) == [1]


def test_frequencies_of_sampled_tokens_are_the_softmax(comm: MPI.Intracomm):
    """4,000 samples of five tokens: each frequency is within five standard deviations."""
    logits_V = np.log([0.5, 0.25, 0.15, 0.07, 0.03])
    rows = [
        SamplingRow(SamplingParams(temperature=1, seed=9), 1, position) for position in range(4000)
    ]
    for mesh, logits_Mv in shards(comm, np.tile(logits_V, (len(rows), 1))):
        counts = np.bincount(sample(logits_Mv, rows, 5, mesh), minlength=5)
        p = np.exp(logits_V)
        spread = 5 * np.sqrt(p * (1 - p) * len(rows))
        assert (np.abs(counts - p * len(rows)) < spread).all(), counts
