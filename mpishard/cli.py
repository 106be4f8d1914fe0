"""The command line: from what was typed to the command that does it, in `mpishard.commands`."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import mpishard
from mpishard import options
from mpishard.errors import WrongRanks
from mpishard.runtime import launch

if TYPE_CHECKING:
    from mpi4py import MPI


def main() -> int:
    """Run the command that was typed; the exit status."""
    stop_request = launch.StopRequest()
    if sys.argv[1:2] == ["batch"]:  # before all that takes time, so that nothing ends its start
        stop_request.listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # As tokenizers write it, whatever the locale; file names may have stray bytes.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    with ExitStack() as job:
        return launch.run(lambda world: run_command(sys.argv, world, job, stop_request))


def run_command(
    argv: Sequence[str],
    world: MPI.Intracomm,
    job: ExitStack,
    stop_request: launch.StopRequest | None = None,
) -> None:
    """Run the command `argv`, program included, on the ranks of `world`, watched until the end of
    the `job`: a rank that has finished still says so. A batch stops at a `stop_request`, which may
    have come already. Raises UserError for a wrong call or bad input, and SystemExit after printing
    help."""
    parser = make_parser()
    words, renamed = current_names(argv[1:], parser)
    if world.rank == 0:
        for old, new in renamed.items():
            sys.stderr.write(
                f"mpishard: {old} is now {new}; the old name goes in the next release\n"
            )
    args = parser.parse_args(words)
    # Not at the top: NumPy reads the number of threads when loaded.
    from mpishard.commands import COMMANDS
    from mpishard.runtime.floating_point import noted
    from mpishard.runtime.watchdog import Watchdog

    if "timeout" in args:
        args.watch = job.enter_context(Watchdog(world, args.timeout, args.check_collectives))
    args.stop_request = stop_request or launch.StopRequest()
    try:
        with noted():
            COMMANDS[args.command].run(args, world)
    except WrongRanks as error:
        command = f"{launch.launcher()} -n {error.ranks} {retyped(argv, error.tp)}"
        raise error.with_command(command) from None


# Names of the release before this one, and what they are called now: options, values, commands.
RENAMED = {
    "place": "eplb",
    "--copies": "--redundant-experts",
    "--expert-capacity": "--expert-capacity-factor",
    "--expert-dispatch": "--moe-token-dispatcher",
    "--expert-drop": "--token-drop-policy",
    "--expert-stats": "--expert-load",
    "--kv-interleave": "--cp-kv-cache-interleave-size",
    "--kv-memory": "--kv-cache-memory-bytes",
    "--max-batch-tokens": "--max-num-batched-tokens",
    "--max-positions": "--max-model-len",
    "--max-sequences": "--max-num-seqs",
    "--prefill-chunk": "--chunked-prefill-size",
}
RENAMED_VALUES = {
    ("--moe-token-dispatcher", "gather"): "all-gather",
    ("--token-drop-policy", "probability"): "probs",
}


def current_names(words: Sequence[str], parser: options.Parser) -> tuple[list[str], dict[str, str]]:
    """`words` with the names of this release in place of those of the last, and which those are.
    A word that is no option of its command, such as a prompt, stays as it is.

    >>> words = ["generate", "--kv-interleave=4", "--expert-dispatch", "gather"]
    >>> current_names(words, make_parser())[0]
    ['generate', '--cp-kv-cache-interleave-size=4', '--moe-token-dispatcher', 'all-gather']
    >>> current_names(["generate", "--prompt", "--copies=3 of what?"], make_parser())[0]
    ['generate', '--prompt', '--copies=3 of what?']
    """
    current: list[str] = []
    renamed: dict[str, str] = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        of = parser.commands.get(current[0], parser) if current else parser
        if name in RENAMED and (place == 0 or of.takes(RENAMED[name])):
            renamed[name] = name = RENAMED[name]
        before = current[-1] if current else ""
        if not equals:
            name = RENAMED_VALUES.get((before, name), name)
        value = RENAMED_VALUES.get((name, value), value)
        current.append(f"{name}{equals}{value}")
    return current, renamed


def retyped(argv: Sequence[str], tp: int) -> str:
    """The command line `argv` as it is to be typed for another `tp`: its --tp, if any, changed."""
    is_module = Path(argv[0]).name == "__main__.py"
    words = ["python", "-m", "mpishard"] if is_module else ["mpishard"]
    for before, word in zip(argv, argv[1:], strict=False):
        flag, equals, _ = word.partition("=")
        if before in options.TP_FLAGS:
            word = str(tp)
        elif equals and flag in options.TP_FLAGS:
            word = f"{flag}={tp}"
        words.append(word)
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """`word` as a shell takes it; what does not print, as bash's $'…' has it, so that a command is
    one line.

    >>> print(quoted("a b"), quoted("a\\n'b'"))
    'a b' $'a\\x0a\\'b\\''
    """
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escaped, word))}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def make_parser() -> options.Parser:
    """The parser of all commands. Loads them, and so NumPy."""
    from mpishard.commands import COMMANDS

    parser = options.Parser(
        prog="mpishard",
        description="Every parallelism of LLM inference, in NumPy over MPI.",
        epilog="Start with several ranks: mpirun -n 4 mpishard generate MODEL --tp 2 --dp 2 …",
    )
    parser.add_argument("--version", action="version", version=mpishard.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.SUMMARY
        parser.commands[name] = commands.add_parser(name, help=summary, description=summary)
        command.add_arguments(parser.commands[name])
    return parser
