#!/usr/bin/env python3
"""Run a command on a small network of hosts, all of them on this machine.

    python tests/lab/hosts.py 2 mpirun -n 4 -ppn 2 mpishard generate MODEL --tp 4 --prompt 'def f'
    python tests/lab/hosts.py --delay 100 --rate 1000 2 bash

A host is a set of Linux namespaces: it has a name (host1, host2, …), an address, processes and
shared memory of its own, so that ranks on two hosts have nothing but TCP between them. Files are
those of this machine. The command runs on one more host, `head`, as on the login node of a cluster;
there the mpirun of MPICH (Hydra) starts ranks on the hosts, in blocks of `-ppn` ranks. When the
command ends, or is ended, everything on all hosts ends with it; nothing is left to be taken down.

Without options the hosts are on one kernel bridge, as fast as the machine. `--delay` and `--rate`
put them on the ports of `switch.py` instead, which makes the network as slow as one likes; it
takes time of a core itself. Needs Linux, util-linux and iproute2, and the right to make namespaces:
that of root, or that of ordinary users to namespaces of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PROGRAMS = ("unshare", "nsenter", "setpriv", "mount", "hostname", "ip")  # what all this is made of
MOST = 200  # hosts, so that their addresses end in one byte

NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")

# A host's name, names of hosts and network devices are its own: UCX looks for devices in /sys,
# which shows those of the network namespace it was mounted in.
SETTLE = """set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t sysfs sysfs /sys
ip link set lo up
"""
OWN_SHARED_MEMORY = "mount -t tmpfs tmpfs /dev/shm"
CONNECT = 'ip addr add "$1/24" dev eth0 && ip link set eth0 up'
# All that a lab needs, in a machine that is thrown away.
TRIAL = f"""{SETTLE}
{OWN_SHARED_MEMORY}
ip link add bridge type bridge
ip link add one-end type veth peer name other-end
"""

# What the head knows of the hosts, for itself and for agent.sh: in its own shared memory, so that
# it is gone with the head.
LAB = Path("/dev/shm/lab")


class Host(NamedTuple):
    """A name, an address, and the process whose namespaces are the host."""

    name: str
    address: str
    process: int

    def command(self, *words: str) -> list[str]:
        """`words` as a command that runs on this host."""
        target = f"/proc/{self.process}/ns"
        names = [f"--{name}={target}/{name}" for name in ("net", "uts", "ipc")]
        names += [f"--pid={target}/pid_for_children", f"--mount={target}/mnt"]
        return ["nsenter", *names, "--wd=.", "--", *words]


def main() -> int:
    args = _parse()
    if os.environ.get("MPISHARD_LAB_HEAD") == "1":
        return on_head(args)
    if problem := obstacle():
        print(f"hosts.py: error: {problem}", file=sys.stderr)
        return 2
    return on_new_machine([sys.executable, *sys.argv])


def obstacle() -> str | None:
    """Why there can be no hosts on this machine, None if they can be."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            return f"hosts need `{program}`, of util-linux or iproute2, which is not on the PATH"
    trial = subprocess.run(
        unshared("sh", "-c", TRIAL, "sh", "trial", os.devnull),
        capture_output=True,
        text=True,
    )
    if trial.returncode != 0:
        refused = " ".join(trial.stderr.split()) or f"status {trial.returncode}"
        return f"hosts need namespaces, which this system refuses here and now: {refused}"
    return None


def unshared(*words: str) -> list[str]:
    """`words` as a command in namespaces of its own, that lives no longer than who starts it: an
    ordinary user is root of a namespace of users first."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    leash = ["setpriv", "--pdeathsig", "KILL"]
    return [*leash, "unshare", *user, *NAMESPACES, "--mount-proc", "--fork", "--kill-child", *words]


def on_new_machine(command: list[str]) -> int:
    """The exit status of `command`, which is process 1 of `head`."""
    settings = {**os.environ, "MPISHARD_LAB_HEAD": "1"}
    with subprocess.Popen(unshared(*command), env=settings) as machine:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the command
        return _status(machine.wait())


def on_head(args: argparse.Namespace) -> int:
    """The exit status of the command, run on `head` beside new hosts. This process is the first of
    its namespace of processes: when it ends, so does everything on all hosts."""
    subprocess.run(OWN_SHARED_MEMORY.split(), check=True)
    LAB.mkdir()
    names = ["head", *(f"host{number}" for number in range(1, args.hosts + 1))]
    addresses = [f"10.77.0.{number}" for number in range(1, len(names) + 1)]
    table = LAB / "hosts"
    lines = [f"{address} {name}\n" for name, address in zip(names, addresses, strict=True)]
    table.write_text("".join(["127.0.0.1 localhost\n", *lines]))
    subprocess.run(["sh", "-c", SETTLE, "sh", "head", table], check=True)
    processes = [os.getpid(), *(start_host(name, table) for name in names[1:])]
    hosts = [Host(*facts) for facts in zip(names, addresses, processes, strict=True)]
    for host in hosts:
        (LAB / host.name).write_text(str(host.process))
    if args.delay or args.rate:
        join_by_switch(hosts, args.delay, args.rate)
    else:
        join_by_bridge(hosts)
    for host in hosts:
        subprocess.run(host.command("sh", "-c", CONNECT, "sh", host.address), check=True)
    (LAB / "hostfile").write_text("".join(f"{name}\n" for name in names[1:]))
    os.environ.update(
        HYDRA_LAUNCHER="ssh",
        HYDRA_LAUNCHER_EXEC=str(HERE / "agent.sh"),
        HYDRA_HOST_FILE=str(LAB / "hostfile"),
    )
    del os.environ["MPISHARD_LAB_HEAD"]  # hosts may have hosts
    return run_as_first(args.command)


def start_host(name: str, table: Path) -> int:
    """The process whose namespaces are the new host `name`."""
    life = f"{SETTLE}\n{OWN_SHARED_MEMORY}\necho up\nexec sleep infinity"
    host = subprocess.Popen(
        unshared("sh", "-c", life, "sh", name, str(table)), stdout=subprocess.PIPE, text=True
    )
    assert host.stdout is not None
    if host.stdout.readline() != "up\n":
        raise SystemExit(f"hosts.py: error: {name} did not come up")
    return host.pid


def join_by_bridge(hosts: list[Host]) -> None:
    """Give every host a device eth0, all of them on one bridge of the head's kernel."""
    _ip("link", "add", "bridge", "type", "bridge")
    _ip("link", "set", "bridge", "up")
    for host in hosts:
        port = f"to-{host.name}"
        peer = ["peer", "name", "eth0", "netns", str(host.process)]
        _ip("link", "add", port, "type", "veth", *peer)
        _ip("link", "set", port, "master", "bridge", "up")


def join_by_switch(hosts: list[Host], delay: float, rate: float) -> None:
    """Give every host a device eth0, all of them on a switch of this delay and rate."""
    processes = [str(host.process) for host in hosts]
    words = [sys.executable, str(HERE / "switch.py"), "--delay", str(delay), "--rate", str(rate)]
    switch = subprocess.Popen([*words, *processes], stdout=subprocess.PIPE, text=True)
    assert switch.stdout is not None
    if switch.stdout.readline() != "ready\n":
        raise SystemExit("hosts.py: error: the switch did not start")


def run_as_first(command: list[str]) -> int:
    """The exit status of `command`, while this process does what the first one must: take leave
    of processes whose parents have ended."""
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        print(f"hosts.py: error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the command
    while True:
        ended, status = os.wait()
        if ended == process.pid:
            return _status(os.waitstatus_to_exitcode(status))


def _status(code: int) -> int:
    """The exit status in a shell's terms, where a negative `code` is a signal."""
    return code if code >= 0 else 128 - code


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a command on a small network of hosts, all of them on this machine.",
        usage="%(prog)s [--delay MICROSECONDS] [--rate MBIT] HOSTS COMMAND …",
    )
    parser.add_argument("hosts", type=int, metavar="HOSTS", help=f"how many, 1 to {MOST}")
    parser.add_argument(
        "--delay", type=float, default=0, metavar="MICROSECONDS", help="of each packet, one way"
    )
    parser.add_argument(
        "--rate", type=float, default=0, metavar="MBIT", help="a second that a host may send"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND …")
    args = parser.parse_args()
    if not 1 <= args.hosts <= MOST:
        parser.error(f"{args.hosts} hosts: there can be 1 to {MOST}")
    if args.delay < 0 or args.rate < 0:
        parser.error("--delay and --rate cannot be negative")
    if not args.command:
        parser.error("there is no command to run on them")
    return args


if __name__ == "__main__":
    sys.exit(main())
