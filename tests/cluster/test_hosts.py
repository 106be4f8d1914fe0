"""Ranks on several hosts: the hosts of ``tests/lab/hosts.py``, which have nothing but TCP between
them, and what the commands answer there.

They are skipped where this system does not allow its user to make namespaces, or where mpirun is
not that of MPICH, the one that the lab tells where its hosts are.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from commands.shell import completions
from mpi_runner import Launch, run_mpi
from mpi_runner.launch import CHECKOUT, mpirun
from mpi_runner.warm import end_warm_ranks

HOSTS = CHECKOUT / "tests" / "lab" / "hosts.py"
MODEL, MIXTURE = (CHECKOUT / "data" / name for name in ("cpython-4m", "cpython-moe-7m"))
PROMPTS = ["def read(self", "The module provides", "class Queue:", "import"]
ASKED = [*(word for text in PROMPTS for word in ("--prompt", text)), "--max-tokens", "6"]


def lab(*words: object) -> subprocess.CompletedProcess[str]:
    """What ``hosts.py WORDS`` answers."""
    command = [sys.executable, str(HOSTS), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def hosts():
    """Skips the tests for which there can be no hosts here."""
    trial = lab(1, "true")
    if trial.returncode == 2:
        pytest.skip(trial.stderr.strip())
    assert trial.returncode == 0, trial.stderr
    yield
    end_warm_ranks()  # which are on hosts that no other test wants


@pytest.fixture
def spread(hosts, monkeypatch):
    """Lets the mpirun of this test start its ranks on so many hosts, in blocks of so many."""
    version = subprocess.run([*mpirun(), "--version"], capture_output=True, text=True).stdout
    if "HYDRA" not in version:
        pytest.skip(f"{shlex.join(mpirun())} is not MPICH's, which the lab tells of its hosts")

    def over(count: int, ranks_each: int, *options: object) -> None:
        network = [sys.executable, HOSTS, *options, count]
        command = [*network, *mpirun(), "-ppn", ranks_each]
        monkeypatch.setenv("MPISHARD_MPIRUN", shlex.join(map(str, command)))

    return over


@cache
def of_one_rank(model: Path) -> list[dict]:
    return completions(None, model, *ASKED)


WHERE = """
from mpi4py import MPI
world = MPI.COMM_WORLD
node = world.Split_type(MPI.COMM_TYPE_SHARED)
facts = world.gather((MPI.Get_processor_name(), node.size))
if world.rank == 0:
    print(facts)
"""


@pytest.mark.parametrize("count, each", [(2, 2), (4, 1)])
def test_ranks_are_on_hosts_of_their_own(spread, count, each):
    spread(count, each)
    run = run_mpi(4, ["-c", WHERE])
    places = [(f"host{rank // each + 1}", each) for rank in range(4)]
    assert run.stdout.strip() == str(places), run.stderr


# Each on so many hosts, so that the network is between different axes.
LAYOUTS = {
    "tensor": (MODEL, 2, "--tp 4"),
    "tensor, a rank a host": (MODEL, 4, "--tp 4"),
    "sequence": (MODEL, 4, "--tp 4 --sequence-parallel"),
    "flash decoding": (MODEL, 2, "--tp 8 --flash-decoding"),
    "context, ring": (MODEL, 4, "--cp 4 --chunked-prefill-size 3"),
    "context, all-gather": (MODEL, 2, "--cp 2 --tp 2 --cp-prefill all-gather"),
    "data": (MODEL, 4, "--dp 4"),
    "data over hosts": (MODEL, 2, "--dp 2 --tp 2"),
    "expert": (MIXTURE, 2, "--tp 2 --dp 2 --ep 4"),
    "expert, a rank a host": (MIXTURE, 4, "--tp 2 --dp 2 --ep 4"),
    "expert, gather": (MIXTURE, 4, "--cp 4 --ep 4 --moe-token-dispatcher all-gather"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_answers_are_those_of_one_rank(spread, name):
    model, count, layout = LAYOUTS[name]
    expected = of_one_rank(model)  # before mpirun leads to the hosts
    ranks = math.prod(map(int, re.findall(r"--[tcd]p (\d+)", layout)))
    spread(count, ranks // count)
    assert completions(ranks, model, *ASKED, *layout.split()) == expected


TRAFFIC = """
import json, sys
from pathlib import Path
from mpi4py import MPI
import mpishard

def sent():
    world.Barrier()
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())

world = MPI.COMM_WORLD
model = mpishard.load(sys.argv[1], world, **json.loads(sys.argv[2]))
prompts = [list(range(3, 400)), list(range(400, 10, -1))]
# Connections are made at the first message.
model.generate(prompts, mpishard.SamplingParams(max_tokens=1))
model.mesh.ledger.clear()
before = sent()
model.generate(prompts, mpishard.SamplingParams(max_tokens=1))
passed = sent() - before
if world.rank == 0:
    entries = [entry.wire_bytes for *_, entry in model.mesh.ledger]
    print(json.dumps([passed, sum(entries)]))
"""


def traffic(**layout: object) -> tuple[float, float]:
    """Bytes that the first of two hosts, of a rank each, sends for two prompts of 400 tokens: as
    the host's network device counts them, and as the ledger of its rank does."""
    run = run_mpi(2, ["-c", TRAFFIC, MODEL, json.dumps(layout)])
    assert run.returncode == 0, run.stderr
    counted, entered = json.loads(run.stdout)
    return counted, entered


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}], ids=str
)
def test_the_network_carries_what_the_ledger_says(spread, layout):
    spread(2, 1)
    counted, entered = traffic(**layout)
    assert 1e6 < entered < counted < 1.25 * entered  # the rest: headers, receipts, barriers


def test_data_parallel_hosts_leave_the_network_alone(spread):
    spread(2, 1)
    counted, entered = traffic(dp=2)
    assert entered <= counted < 1e5


# Every host has shared memory of its own, and there a copy of the model.
ANOTHER_REVISION = """
import shutil, sys
from mpi4py import MPI
from mpishard.cli import main
world, path = MPI.COMM_WORLD, "/dev/shm/model"
shutil.copytree(sys.argv.pop(1), path)
if world.rank == 1:
    with open(path + "/model.safetensors", "r+b") as file:
        file.seek(-64, 2)
        last = file.read()
        file.seek(-64, 2)
        file.write(bytes(byte ^ 1 for byte in last))
sys.exit(main())
"""


def test_another_revision_of_the_model_on_another_host(spread):
    spread(2, 1)
    words = ["generate", "/dev/shm/model", "--tp", "2", "--prompt", "def", "--max-tokens", "1"]
    run = run_mpi(2, ["-c", ANOTHER_REVISION, MODEL, *words])
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == (
        "mpishard: error: model /dev/shm/model is not the same on all hosts: host1 differs from "
        "host2 in the bytes of the weights; copy one of them to all"
    )


# One message there and one back.
ROUND_TRIP = """
import time
from mpi4py import MPI
world = MPI.COMM_WORLD
message = bytearray({size})
def exchange():
    for sender in range(2):
        world.Send(message, 1 - sender) if world.rank == sender else world.Recv(message, sender)
exchange()
started = time.perf_counter()
exchange()
if world.rank == 0:
    print(time.perf_counter() - started)
"""


@pytest.mark.parametrize(
    "options, size, least",
    [(["--delay", 20_000], 1, 2 * 0.02), (["--rate", 80], 500_000, 2 * 0.05)],
    ids=["delay", "rate"],
)
def test_the_network_can_be_made_slow(spread, options, size, least):
    spread(2, 1, *options)
    run = run_mpi(2, ["-c", ROUND_TRIP.format(size=size)])
    if "no network device in user space" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) >= least


ENDLESS = "from mpi4py import MPI\nwhile True: MPI.COMM_WORLD.Barrier()"


def wait_for_rank(launch: Launch, rank: int) -> int:
    """The process id of `rank`, as soon as it is there."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return launch.pid(rank)
        except LookupError:
            assert time.monotonic() < deadline, "the ranks do not start"
            time.sleep(0.05)


def all_gone(launch: Launch) -> bool:
    """Whether every process of `launch` ends within seconds, hosts included."""
    deadline = time.monotonic() + 10
    while list(launch.members()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_rank_killed_on_another_host_ends_the_job(spread):
    spread(2, 1)
    with Launch(2, ["-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launch:
        os.kill(wait_for_rank(launch, 1), signal.SIGKILL)
        launch.process.communicate(timeout=30)
        assert launch.process.returncode != 0
        assert all_gone(launch)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_hosts_end_with_the_command(spread, end):
    spread(2, 1)
    with Launch(2, ["-c", ENDLESS]) as launch:
        wait_for_rank(launch, 1)
        launch.process.send_signal(end)
        launch.process.wait(timeout=30)
        assert all_gone(launch)


def test_the_command_has_its_status_and_its_streams(hosts):
    run = lab(2, "sh", "-c", "hostname; echo trouble >&2; exit 7")
    assert (run.returncode, run.stdout, run.stderr) == (7, "head\n", "trouble\n")
    assert lab(1, "sh", "-c", "kill -9 $$").returncode == 128 + 9


def test_what_cannot_be_is_refused(hosts):
    run = lab(1, "no-such-command")
    assert run.returncode == 127
    assert run.stderr == "hosts.py: error: no-such-command: No such file or directory\n"
    assert "0 hosts: there can be 1 to 200" in lab(0, "true").stderr
    assert "cannot be negative" in lab("--delay", -1, 2, "true").stderr
    assert "there is no command" in lab(2).stderr


def test_a_missing_program_is_named():
    command = [sys.executable, str(HOSTS), "1", "true"]
    run = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nowhere"})
    assert run.returncode == 2
    assert run.stderr.startswith("hosts.py: error: hosts need `unshare`, of util-linux")
