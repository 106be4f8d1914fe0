"""Lanes: tests that one launch runs in their order, and how many launches the machine carries.

Several lanes run beside each other where there are cores for them. There is one for each number of
ranks, one for each folder of serial tests that keep ranks warm, and one for each file of tests that
wait.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mpi_runner.job import Job, ranks_of
from mpi_runner.launch import Launch

PLAN = "MPI_RUNNER_PLAN"  # a file, named in the environment of the ranks that a controller starts

WARM = ("commands", "cluster")  # folders of serial tests that keep ranks warm

# How many lanes of tests that wait may run at once: together they take about a core.
WAITING = 3


@dataclass
class Lane:
    """Tests of one number of ranks, or serial ones if that is None."""

    name: str
    size: int | None = None
    waits: bool = False
    items: list[pytest.Item] = field(default_factory=list)
    launch: Launch | None = None
    job: Job | None = None
    seconds: float = 0.0  # that its launches took which ended well, and of processors
    cpu: float = 0.0

    @property
    def is_running(self) -> bool:
        return self.launch is not None and self.launch.process.poll() is None

    def start(self, first: pytest.Item, options: list[str], directory: Path) -> None:
        """Launch the tests from `first` on. Raises FileNotFoundError without mpirun."""
        todo = [item.nodeid for item in self.items[self.items.index(first) :]]
        files = sorted({str(item.path) for item in self.items})
        plan = directory / "plan.json"
        plan.write_text(json.dumps({"size": self.size, "tests": todo}))
        with open(directory / "output", "w") as output:
            self.launch = Launch(
                self.size,
                ["-m", "pytest", *options, *files],
                env={PLAN: str(plan)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.job = Job(first.config, directory, self.size or 1)

    def how_ended(self) -> str | None:
        """How the launch ended, None while it runs."""
        assert self.launch is not None
        status = self.launch.process.poll()
        what = "pytest" if self.size is None else "mpirun"
        return None if status is None else f"{what} ended with status {status}"

    def finish(self) -> str | None:
        """After the last test, wait for the ranks to leave MPI; what went wrong if they do not."""
        assert self.launch is not None and self.job is not None
        try:
            status = self.launch.process.wait(30)
            self.job.read()
        except subprocess.TimeoutExpired:
            return "30 s after this last test the ranks had not ended"
        return f"after this last test {self.how_ended()}" if status else None

    def output(self) -> str:
        """The end of what the launch has printed."""
        assert self.job is not None
        lines = (self.job.directory / "output").read_text(errors="replace").splitlines()
        return "\n".join(lines[-30:])

    def stop(self) -> None:
        """End the launch, and add up what it took."""
        if self.launch is not None:
            self.launch.end()
        if self.job is not None:
            self.job.read()
            self.seconds += self.job.seconds
            self.cpu += self.job.cpu
        self.launch = self.job = None


def divide(items: Iterable[pytest.Item], is_watched: bool) -> tuple[list[pytest.Item], list[Lane]]:
    """The tests that the controller runs itself, and the lanes of all others, in the order in which
    they are to start. Where `is_watched`, it runs all serial tests."""
    lanes: dict[tuple[int, float, str], Lane] = {}
    for item in items:
        size, waits = ranks_of(item), item.get_closest_marker("waits")
        order: tuple[int, float, str]
        if size is not None:
            order = 3, size, f"np{size}"
        elif is_watched:
            order = 0, 0, "serial"
        elif waits:
            order = 2, -waits.args[0], f"waiting: {item.path.stem}"
        elif (folder := item.path.parent.name) in WARM:
            order = 1, WARM.index(folder), folder
        else:
            order = 0, 0, "serial"
        lane = lanes.setdefault(order, Lane(order[-1], size, bool(waits)))
        lane.items.append(item)
    sorted_lanes = [lane for _, lane in sorted(lanes.items(), key=lambda entry: entry[0])]
    if sorted_lanes and sorted_lanes[0].size is None:
        return sorted_lanes[0].items, sorted_lanes[1:]
    return [], sorted_lanes


def fits(lane: Lane, beside: Iterable[Lane], busy: int, cores: int) -> bool:
    """Whether the machine carries `lane` beside the running lanes, where `busy` cores have other
    work.

    Ranks that wait for each other do so best alone. Tests that wait for time to pass need hardly
    any of a core, and disturb nobody but such ranks.
    """
    running = list(beside)
    waiting = sum(other.waits for other in running)
    taken = busy + sum(cores_of(other, cores) for other in running if not other.waits)
    if lane.waits:
        return waiting < WAITING and not any((other.size or 1) > 1 for other in running)
    if (lane.size or 1) > 1:
        taken += waiting
    return taken + cores_of(lane, cores) <= cores


def cores_of(lane: Lane, cores: int) -> int:
    return min(lane.size or 1, cores)
