#!/usr/bin/env python3
"""A slow Ethernet switch between network namespaces, for kernels that cannot delay packets.

    switch.py --delay MICROSECONDS --rate MBIT PROCESS…

Each namespace, given by a process in it, gets a device eth0. A packet that is sent there waits
until the packets sent before it have passed at MBIT a second (0: at once), then for the delay, and
comes out where its address was seen before, or everywhere else. Says `ready` when all devices are
there. `hosts.py` starts it; it ends when it is killed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterable

# From Linux's headers.
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
PR_SET_TIMERSLACK = 29

MTU = 9000  # jumbo frames: fewer packets to carry
LARGEST = 65536  # bytes of a packet, at most
AT_ONCE = 16  # packets to take from a port before the others have their turn

# Shorter waits than poll's milliseconds are slept in steps, each of which may be late by the slack.
STEP_SECONDS = 20e-6
SLACK_NANOSECONDS = 1000

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    args = _parse()
    try:
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        ports = [open_port(process, home) for process in args.processes]
        _libc.prctl(PR_SET_TIMERSLACK, SLACK_NANOSECONDS, 0, 0, 0)
    except OSError as error:
        print(f"switch.py: error: no network device in user space: {error}", file=sys.stderr)
        return 1
    print("ready", flush=True)
    Switch(ports, args.delay * 1e-6, args.rate * 1e6 / 8).run()
    return 0


class Switch:
    """Packets on their way between `ports`, by `delay` in seconds and `rate` in bytes a second."""

    def __init__(self, ports: list[int], delay: float, rate: float) -> None:
        self.ports = ports
        self.delay = delay
        self.rate = rate
        self.behind: dict[bytes, int] = {}  # the port behind which an address was seen
        self.free = dict.fromkeys(ports, 0.0)  # when what a port sent will have passed
        # (when it is due, its number: those due together stay in order, port, packet)
        self.travelling: list[tuple[float, int, int, bytes]] = []
        self.count = 0

    def run(self) -> None:
        poll = select.poll()
        for port in self.ports:
            poll.register(port, select.POLLIN)
        while True:
            self._deliver()
            wait = self.travelling[0][0] - time.monotonic() if self.travelling else None
            ready = poll.poll(None if wait is None else max(0, int(wait * 1e3)))
            for port, _ in ready:
                self._take(port)
            if not ready and self.travelling:
                time.sleep(min(STEP_SECONDS, max(0, self.travelling[0][0] - time.monotonic())))

    def _deliver(self) -> None:
        """Let out the packets that are due."""
        while self.travelling and self.travelling[0][0] <= time.monotonic():
            _, _, port, packet = heapq.heappop(self.travelling)
            try:
                os.write(port, packet)
            except OSError:  # its queue is full: lost, as on any network; TCP sends it again
                pass

    def _take(self, port: int) -> None:
        """Take in what `port` has sent."""
        for _ in range(AT_ONCE):
            try:
                packet = os.read(port, LARGEST)
            except BlockingIOError:
                return
            target, source = packet[:6], packet[6:12]
            self.behind[source] = port
            due = self._passed(port, len(packet)) + self.delay
            for out in self._ways(port, target):
                self.count += 1
                heapq.heappush(self.travelling, (due, self.count, out, packet))

    def _passed(self, port: int, size: int) -> float:
        """When a packet of `size` bytes that `port` sends now will have passed at the rate."""
        if not self.rate:
            return time.monotonic()
        self.free[port] = max(time.monotonic(), self.free[port]) + size / self.rate
        return self.free[port]

    def _ways(self, port: int, target: bytes) -> Iterable[int]:
        """The ports at which a packet from `port` comes out."""
        if target in self.behind:
            return [self.behind[target]]
        return [out for out in self.ports if out != port]  # unknown, or for all


def open_port(process: int, home: int) -> int:
    """A new device eth0 in the network namespace of `process`, as a file of packets."""
    _enter(os.open(f"/proc/{process}/ns/net", os.O_RDONLY))
    port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(port, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TAP | IFF_NO_PI))
    device = ["ip", "link", "set", "eth0", "mtu", str(MTU), "txqueuelen", "2000"]
    subprocess.run(device, check=True)
    _enter(home)
    return port


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A slow switch between network namespaces.")
    parser.add_argument("--delay", type=float, required=True, metavar="MICROSECONDS")
    parser.add_argument("--rate", type=float, required=True, metavar="MBIT")
    parser.add_argument("processes", type=int, nargs="+", metavar="PROCESS")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
