"""How replicas come by their requests and answers get to rank 0."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from sweep import divisors
from tiny_text import write_speaker

import mpishard
from mpishard.batch.dispatch import Progress, ReplicaClient
from mpishard.batch.open import scheduler_config
from mpishard.communication.mailbox import Mailbox
from mpishard.engine.sampling_params import SamplingParams
from mpishard.model import Decoder
from mpishard.sequences.step import Step

pytestmark = pytest.mark.ranks

VARIANT = "llama-gqa"
PARAMS = SamplingParams(1.1, seed=2, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model for every rank, each in a directory of its own: rank 0's files of the job are
    seen by nobody else."""
    return write_speaker(VARIANT, tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A job of 24 lines, on rank 0; on the others names of files that do not exist."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    if MPI.COMM_WORLD.rank == 0:
        lines = [{"id": place, "input_ids": [1 + place, 2]} for place in range(24)]
        source.write_text("\n".join(map(json.dumps, lines)))
    return source, target


def loaded(path: Path, comm: MPI.Intracomm) -> Iterator[mpishard.Model]:
    """The model in every number of replicas that the ranks can be, of tensor-parallel ranks and of
    context-parallel ones in turn."""
    for place, dp in enumerate(divisors(comm.size)):
        size = comm.size // dp
        tp, cp = (size, 1) if place % 2 else (1, size)
        yield mpishard.load(path, comm, tp, dp, cp=cp)


def result(target: Path, comm: MPI.Intracomm) -> list[dict[str, Any]]:
    """The output's lines, and no output, on all ranks."""
    lines = None
    if comm.rank == 0:
        lines = [json.loads(line) for line in target.read_text().splitlines()]
        target.unlink()
    return comm.bcast(lines)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, comm: MPI.Intracomm, slow: int) -> Iterator[list[int]]:
    """How many answers each rank has given, of which one is slow."""
    given = [0]
    answer, forward = ReplicaClient.answer, Decoder.forward

    def counting(client: ReplicaClient, *arguments: Any) -> None:
        given[0] += 1
        answer(client, *arguments)

    def dragging(decoder: Decoder, step: Step) -> np.ndarray:
        time.sleep(0.05 if decoder.mesh.dp.rank == slow else 0.002)
        return forward(decoder, step)

    with monkeypatch.context() as patch:
        patch.setattr(ReplicaClient, "answer", counting)
        patch.setattr(Decoder, "forward", dragging)
        yield given


def test_only_rank_0_needs_to_see_the_files(path, files, comm):
    """And every layout gives the same answers, in the order of the input."""
    prompts = [[1 + place, 2] for place in range(24)]
    alone = mpishard.load(path).generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    right = [answer.output_ids for answer in alone]
    for model in loaded(path, comm):
        report = model.batch(*files, SamplingParams(max_tokens=5, ignore_eos=True))
        assert report.complete and comm.allgather(report) == [report] * comm.size
        assert (report.total, report.before, report.answered, report.refused) == (24, 0, 24, 0)
        assert (report.prompt_tokens, report.completion_tokens) == (48, 120)
        answers = result(files[1], comm)
        assert [answer["id"] for answer in answers] == list(range(24))
        assert [answer["output_ids"] for answer in answers] == right


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("slow", [0, 1])
def test_a_replica_draws_as_it_becomes_free(path, files, comm, monkeypatch, slow):
    """The slow one, be it that of rank 0 who hands out, does less."""
    for model in loaded(path, comm):
        dp = model.mesh.dp
        if dp.size < 2:
            continue
        with watched(monkeypatch, comm, slow) as given:
            assert model.batch(*files, PARAMS, scheduler_config(max_num_seqs=2)).complete
        shares = comm.allgather(given[0])[:: model.mesh.layout.replica_size]
        assert sum(shares) == 24 and shares[slow] == min(shares) < 24 / dp.size - 1
        result(files[1], comm)


@pytest.mark.ranks(2, 3, 4)
def test_a_small_job_is_shared_from_the_beginning(path, files, comm, monkeypatch):
    """Even if there are places for all of it in each replica."""
    for model in loaded(path, comm):
        with watched(monkeypatch, comm, -1) as given:
            assert model.batch(*files, PARAMS).complete
        shares = comm.allgather(given[0])[:: model.mesh.layout.replica_size]
        assert sum(shares) == 24 and max(shares) - min(shares) <= 6, shares
        result(files[1], comm)


@pytest.mark.ranks(1, 2, 3, 4)
def test_one_rank_that_is_told_stops_all_and_the_job_goes_on(path, files, comm):
    for model in loaded(path, comm):
        seen: list[Progress] = []
        steps = iter(range(1, 1000))

        def told(steps=steps) -> bool:
            return comm.rank == comm.size - 1 and next(steps) > 9

        report = model.batch(*files, PARAMS, scheduler_config(max_num_seqs=1), told, seen.append)
        assert not report.complete and 0 < report.answered < 24
        assert comm.allgather(report.answered) == [report.answered] * comm.size
        assert [progress.total for progress in seen] == [24] * len(seen)
        assert bool(seen) == (comm.rank == 0)
        again = model.batch(*files, PARAMS)
        assert again.complete and again.before == report.answered
        assert again.answered == 24 - report.answered
        assert len(result(files[1], comm)) == 24


@pytest.mark.ranks(1, 2)
def test_nothing_is_done_when_told_before_it_begins(path, files, comm):
    model = mpishard.load(path, comm, tp=comm.size)
    report = model.batch(*files, PARAMS, should_stop=lambda: True)
    assert report.answered == 0 and not report.complete


def test_replicas_never_meet(path, files, comm):
    for model in loaded(path, comm):
        model.mesh.ledger.clear()
        assert model.batch(*files, PARAMS).complete
        groups = {group for _, group, _ in model.mesh.ledger}
        assert groups <= {"tp", "cp", "kv", "replica", "world"}
        assert model.mesh.ledger["all_reduce", "world"].calls == 1, "the memory that is free"
        result(files[1], comm)


@pytest.mark.ranks(1, 2, 3)
def test_a_wrong_job_is_refused_on_all_ranks(path, files, comm):
    model = mpishard.load(path, comm, tp=comm.size)
    with pytest.raises(mpishard.UserError, match="is a directory: give the name of a file"):
        model.batch(files[0], files[1].parent, PARAMS)


def test_messages_arrive_in_their_order_at_whoever_has_time(comm):
    post = Mailbox(comm)
    everyone = range(comm.size)
    large = bytes(range(256)) * 4000
    for to in everyone:
        for number in range(5):
            post.send(b"%d %d" % (comm.rank, number), to, tag=1)
        post.send(large, to, tag=2)
        post.send(b"", to, tag=1)
    got: dict[int, list[bytes]] = {rank: [] for rank in everyone}
    packets: list[bytes] = []
    while sum(map(len, got.values())) < 6 * comm.size or len(packets) < comm.size:
        for source, message in post.poll(1):
            got[source].append(message)
        packets += [message for _, message in post.poll(2)]
    for rank, messages in got.items():
        assert messages == [*(b"%d %d" % (rank, number) for number in range(5)), b""]
    assert packets == [large] * comm.size
    assert list(post.poll(1)) == []
    post.close()
