#!/usr/bin/env python3
"""Run a command beside a small Slurm cluster, all of whose nodes are on this machine.

    python tests/lab/slurm.py 4 bash
    python tests/lab/slurm.py --cpus 2 2 srun --nodes 2 --ntasks 4 hostname

Slurm's own daemons run as on a cluster, node1, node2, … beside each other, as the user who calls
this and with a configuration of their own: nothing outside of one directory is read or written.
SLURM_CONF leads sbatch, srun and squeue there. When the command ends, or is ended, the jobs are
cancelled and all daemons end. Needs Slurm and munge (on Debian and Ubuntu the packages slurm-wlm,
slurm-wlm-basic-plugins and munge). Nodes are not machines: ranks on two of them share memory, a
file system and a name. For a network between ranks there is `hosts.py`.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
# Where daemons are, which is not on an ordinary user's PATH.
SYSTEM_PATH = os.pathsep.join(("/usr/local/sbin", "/usr/sbin", "/sbin"))
PATIENCE = 30.0  # seconds for the cluster to come up, or for its jobs to end
MOST = 32  # nodes
MEBIBYTE = 2**20

# Nodes may claim more cores than there are, cores may belong to several nodes, and jobs are kept
# together by their processes' parents, since control groups are the system's to give out. A job
# that was put back may start again at once.
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={machine}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
TmpFS={directory}
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/{tasks}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PropagateResourceLimits=NONE
{nodes}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class ProblemError(Exception):
    """What keeps the cluster from running, in one sentence."""


def main() -> int:
    args = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if missing := [program for program in DAEMONS if find(program) is None]:
        print(
            f"slurm.py: error: {missing[0]} is not installed: this needs Slurm and munge, on "
            "Debian the packages slurm-wlm, slurm-wlm-basic-plugins and munge",
            file=sys.stderr,
        )
        return 2
    try:
        with ExitStack() as stack:
            directory = args.directory or Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="mpishard-slurm-"))
            )
            settings = stack.enter_context(cluster(directory.absolute(), args.nodes, args.cpus))
            return run(args.command, settings)
    except ProblemError as error:
        print(f"slurm.py: error: {error}", file=sys.stderr)
        return 1
    except FileNotFoundError as error:
        print(f"slurm.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 127


@contextmanager
def cluster(directory: Path, nodes: int, cpus: int) -> Iterator[dict[str, str]]:
    """The environment of a user of a new cluster, which ends with the `with` statement. Raises
    ProblemError if there can be none."""
    directory.mkdir(parents=True, exist_ok=True)
    configuration = directory / "slurm.conf"
    configuration.write_text(configure(directory, nodes, cpus))
    (directory / "cgroup.conf").write_text("")
    # What another Slurm has set, of whose job this may be a part, is not for this one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    settings = {**inherited, "SLURM_CONF": str(configuration)}
    with ExitStack() as running:
        running.callback(end_left, configuration)
        start_munge(directory, settings, running)
        (directory / "state").mkdir(exist_ok=True)
        start("slurmctld", ["-D", "-c"], directory, settings, running)
        for node in range(1, nodes + 1):
            (directory / "spool" / f"node{node}").mkdir(parents=True, exist_ok=True)
            start("slurmd", ["-D", "-N", f"node{node}"], directory, settings, running)
        idle = ["sinfo", "--noheader", "--Node", "--format=%T"]
        _wait_for(
            lambda: _said(idle, settings).split() == ["idle"] * nodes,
            f"the nodes did not come up within {PATIENCE:g} s: the daemons' words are in "
            f"{directory}/*.log",
        )
        running.callback(cancel_jobs, settings)
        yield settings


def run(command: list[str], settings: dict[str, str]) -> int:
    """The exit status of `command`, which does not outlive this call."""
    process = subprocess.Popen(command, env=settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the command
    try:
        return _status(process.wait())
    finally:
        process.kill()
        process.wait()


def configure(directory: Path, nodes: int, cpus: int) -> str:
    """The text of slurm.conf."""
    machine = socket.gethostname().partition(".")[0]
    first, *ports = free_ports(nodes + 1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEBIBYTE
    lines = [
        f"NodeName=node{number} NodeHostname={machine} NodeAddr=127.0.0.1 Port={port} "
        f"CPUs={cpus} RealMemory={memory // nodes} State=UNKNOWN"
        for number, port in enumerate(ports, 1)
    ]
    return CONFIGURATION.format(
        machine=machine,
        port=first,
        user=getpass.getuser(),
        directory=directory,
        tasks="affinity" if cpus <= (os.cpu_count() or 1) else "none",
        nodes="\n".join(lines),
    )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_munge(directory: Path, settings: dict[str, str], running: ExitStack) -> None:
    """Start the daemon by which Slurm's parts know each other, with a key of its own."""
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    files = {"key-file": key, "socket": directory / "munge.socket"}
    files |= {name: directory / f"munge.{name}" for name in ("pid-file", "seed-file")}
    options = [f"--{name}={file}" for name, file in files.items()]
    # It would refuse directories that others may write to, such as /tmp.
    options += ["--foreground", "--force", f"--log-file={directory / 'munge.log'}"]
    start("munged", options, directory, settings, running)
    _wait_for(files["socket"].exists, f"munged did not start: see {directory}/*.log")


def start(
    program: str, options: list[str], directory: Path, settings: dict[str, str], running: ExitStack
) -> None:
    """Start a daemon in the foreground, to be ended with `running`, at the latest with us."""
    leash = ["setpriv", "--pdeathsig", "TERM"]
    name = f"{program}-{options[-1]}" if program == "slurmd" else program
    with (directory / f"{name}.log").open("a") as log:
        daemon = subprocess.Popen(
            [*leash, find(program) or program, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=settings,
            start_new_session=True,  # the keyboard's interrupt is for the command
        )
    running.callback(_end, daemon)


def cancel_jobs(settings: dict[str, str]) -> None:
    """End all jobs, and wait until Slurm says that they have."""
    _said(["scancel", "--user", getpass.getuser()], settings)
    with suppress(ProblemError):  # what is left is ended without Slurm
        _wait_for(lambda: not _said(["squeue", "--noheader"], settings), "jobs do not end")


def end_left(configuration: Path) -> None:
    """Kill what is left of the cluster: processes, of jobs whose keeper has gone, that know it by
    their environment."""
    mark = f"SLURM_CONF={configuration}"
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or it is another user's
            known = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
            if mark in known and int(directory.name) != os.getpid():
                os.kill(int(directory.name), signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def find(program: str) -> str | None:
    """The path of a daemon, None if it is not installed."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), SYSTEM_PATH))
    return shutil.which(program, path=path)


def _said(command: list[str], settings: dict[str, str]) -> str:
    """The standard output of one of Slurm's commands, nothing while it finds no cluster."""
    run = subprocess.run(command, env=settings, capture_output=True, text=True)
    return run.stdout


def _wait_for(there: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        if time.monotonic() > deadline:
            raise ProblemError(otherwise)
        time.sleep(0.1)


def _status(code: int) -> int:
    """The exit status in a shell's terms, where a negative `code` is a signal."""
    return code if code >= 0 else 128 - code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a command beside a small Slurm cluster on this machine.",
        usage="%(prog)s [--cpus N] [--directory DIR] NODES COMMAND …",
    )
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="of a node (2)")
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="for the cluster's files, to stay there"
    )
    parser.add_argument("nodes", type=int, metavar="NODES", help=f"how many, 1 to {MOST}")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND …")
    args = parser.parse_args()
    if not 1 <= args.nodes <= MOST:
        parser.error(f"{args.nodes} nodes: there can be 1 to {MOST}")
    if args.cpus < 1:
        parser.error(f"--cpus {args.cpus}: a node has at least 1")
    if not args.command:
        parser.error("there is no command to run")
    return args


if __name__ == "__main__":
    sys.exit(main())
