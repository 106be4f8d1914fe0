"""A model that all ranks open, each on its own host, and that must be the same on all of them.

A path may lead to other files on another host: another model, another revision, an incomplete copy.
The ranks would then begin collectives of different sizes, or compute wrong numbers together.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mpi4py import MPI

from mpishard.communication.group import CallTracker, CollectiveCall, Group
from mpishard.communication.ledger import Ledger
from mpishard.errors import UserError
from mpishard.storage.fingerprint import identity
from mpishard.storage.source import Source, open_source

MOST_PLACES = 4  # that a sentence lists


def open_on_all(
    path: str | Path,
    comm: MPI.Comm,
    ignore_config: Iterable[str] = (),
    calls: CallTracker | None = None,
) -> Source:
    """The model in a directory, which all ranks of `comm` open. `calls` tracks the collectives of
    this rank.

    Raises UserError on all ranks, as `open_source` does on any of them, and where the model is not
    the same for all: the sentence says what differs and on which hosts.
    """
    source, problem, facts = None, None, {}
    try:
        source = open_source(path, ignore_config)
        facts = identity(source)
    except UserError as error:
        problem = str(error)
    except OSError as error:  # a file that has gone since
        problem = f"cannot read {error.filename or path}: {error.strerror}"
    mine = (MPI.Get_processor_name(), problem, facts)
    with CollectiveCall("agreement", Group(comm, "world", Ledger(), calls or CallTracker())):
        everyones = comm.allgather(mine)
    hosts = [host for host, _, _ in everyones]
    _refuse_problems(hosts, [problem for _, problem, _ in everyones])
    _refuse_differences(path, hosts, [facts for _, _, facts in everyones])
    assert source is not None
    return source


def _refuse_problems(hosts: list[str], problems: list[str | None]) -> None:
    """Raise the problem of the lowest rank that has one; where others have none, it says where."""
    with_problem = [rank for rank, problem in enumerate(problems) if problem is not None]
    if not with_problem:
        return
    problem = problems[with_problem[0]]
    places = _places(hosts, [rank for rank in with_problem if problems[rank] == problem])
    where = "" if None not in problems else f" (on {places}, but not on all)"
    raise UserError(f"{problem}{where}")


def _refuse_differences(path: str | Path, hosts: list[str], facts: list[dict[str, str]]) -> None:
    for what in facts[0]:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, fact in enumerate(facts):
            ranks_by_value.setdefault(fact.get(what, ""), []).append(rank)
        if len(ranks_by_value) > 1:
            groups = [_places(hosts, ranks) for ranks in sorted(ranks_by_value.values(), key=len)]
            differ = "differ" if " and " in groups[0] else "differs"
            others = ", and from ".join(groups[1:])
            raise UserError(
                f"model {path} is not the same on all hosts: {groups[0]} {differ} from {others} in "
                f"{what}; copy one of them to all"
            )


def _places(hosts: list[str], ranks: list[int]) -> str:
    """The hosts of `ranks`, or the ranks themselves where a host has other ranks, too."""
    mine = {hosts[rank] for rank in ranks}
    others = {host for rank, host in enumerate(hosts) if rank not in ranks}
    places = sorted(mine - others)
    places += [f"rank {rank} of {hosts[rank]}" for rank in ranks if hosts[rank] in others]
    shown, left = places[:MOST_PLACES], len(places) - MOST_PLACES
    return " and ".join(shown) + (f" and {left} more" if left > 0 else "")
