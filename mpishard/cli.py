"""The command line: what may be typed. What the commands do stands in `mpishard.commands`."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import mpishard
from mpishard.config.layout import layout_options
from mpishard.errors import UserError
from mpishard.runtime import launch

if TYPE_CHECKING:
    from mpi4py import MPI

TP_FLAGS = ("--tp", "--tensor-parallel-size")
CP_FLAGS = ("--cp", "--context-parallel-size")
EP_FLAGS = ("--ep", "--expert-parallel-size")


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
    words, renamed = current_names(argv[1:])
    args = make_parser().parse_args(words)
    if world.rank == 0:
        for old, new in renamed.items():
            sys.stderr.write(
                f"mpishard: {old} is now {new}; the old name goes in the next release\n"
            )
    # Only now: NumPy reads the number of threads when loaded.
    from mpishard import commands
    from mpishard.runtime.watchdog import Watchdog

    if "timeout" in args:
        args.watch = job.enter_context(Watchdog(world, args.timeout, args.check_collectives))
    args.stop_request = stop_request or launch.StopRequest()
    args.line = lambda ranks, tp: f"{launch.launcher()} -n {ranks} {retyped(argv, tp)}"
    getattr(commands, args.command)(args, world)


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


def current_names(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """`words` with the names of this release in place of those of the last, and which those are.

    >>> current_names(["generate", "--kv-interleave=4", "--expert-dispatch", "gather"])[0]
    ['generate', '--cp-kv-cache-interleave-size=4', '--moe-token-dispatcher', 'all-gather']
    """
    current: list[str] = []
    renamed: dict[str, str] = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in RENAMED and (name.startswith("--") or place == 0):
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
        if before in TP_FLAGS:
            word = str(tp)
        elif equals and flag in TP_FLAGS:
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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a UserError's one message, and that takes no flag twice
    unless it is meant to be repeated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("action", None, Once)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


class Once(argparse.Action):
    """Stores the value of a flag, and refuses a second one: none is ever silently ignored."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.given: argparse.Namespace | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.given is namespace:
            raise argparse.ArgumentError(self, "given twice")
        self.given = namespace
        setattr(namespace, self.dest, values)


def count(text: str) -> int:
    """A number of things, at least 1, from the command line."""
    number = integer(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def integer(text: str) -> int:
    """A whole number from the command line."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)}


def size(text: str) -> int:
    """A number of bytes, at least 1, from the command line."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?((?:[KMGT]i?)?)B?", text, re.ASCII)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in bytes, such as 500MB or 2GiB")
    return size


def number(text: str) -> float:
    """A number from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="mpishard",
        description="Every parallelism of LLM inference, in NumPy over MPI.",
        epilog="Start with several ranks: mpirun -n 4 mpishard generate MODEL --tp 2 --dp 2 …",
    )
    parser.add_argument("--version", action="version", version=mpishard.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_shard(commands)
    _add_inspect(commands)
    _add_generate(commands)
    _add_batch(commands)
    _add_logits(commands)
    _add_bench(commands)
    _add_eplb(commands)
    return parser


def _add_command(commands, name: str, summary: str) -> Parser:
    command = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("model", metavar="MODEL", help="a Hugging Face or a shard directory")
    return command


def _add_layout(command: Parser) -> None:
    layout = command.add_argument_group("layout")
    for option in layout_options():
        layout.add_argument(*option.flags, **option.argument({int: count, float: number}))
    layout.add_argument(
        "--max-model-len", type=count, default=None, metavar="N",
        help="positions to allow instead of those of config.json",
    )  # fmt: skip
    layout.add_argument(
        "--compute-dtype", choices=("float32", "float64"), default="float32",
        help="float64 tells rounding from mistakes (default: float32)",
    )  # fmt: skip


def _add_watch(command: Parser) -> None:
    watch = command.add_argument_group("when something hangs")
    watch.add_argument(
        "--timeout", type=number, default=launch.TIMEOUT, metavar="SECONDS",
        help="end the job, and say where every rank is, when a collective takes longer; ranks that "
        "wait for one that computes, reads or writes are in a collective, so be generous "
        f"(default: {launch.TIMEOUT:g}; 0: never)",
    )  # fmt: skip
    watch.add_argument(
        "--check-collectives", action="store_true",
        help="compare, before each collective, what the ranks are about to do: slow, and a rank "
        "that does something else is named",
    )  # fmt: skip


def _add_chunk(command: Parser) -> None:
    command.add_argument(
        "--chunked-prefill-size", type=count, default=None, metavar="N",
        help="take prompts in by at most N tokens a step (default: whole)",
    )  # fmt: skip


def _add_expert_load(command: Parser) -> None:
    command.add_argument(
        "--expert-load", nargs="?", const="", default=None, metavar="FILE.json",
        help="count the rows of every expert and rank of a mixture; print how uneven they are at "
        "the end, and write them to FILE.json if it is given",
    )  # fmt: skip


def _add_routing(command: Parser) -> None:
    command.add_argument(
        "--record-routing", default=None, metavar="FILE.npz",
        help="write the experts and weights that the routers of a mixture choose for each token",
    )  # fmt: skip
    command.add_argument(
        "--replay-routing", default=None, metavar="FILE.npz",
        help="take the experts and weights that --record-routing wrote, and do not ask the routers",
    )  # fmt: skip


def _add_sampling(command: Parser) -> None:
    sampling = command.add_argument_group(
        "sampling", "A temperature above 0 makes answers differ with --seed, and with it alone."
    )
    sampling.add_argument(
        "--max-tokens", "--max-new-tokens", type=count, default=128, metavar="N",
        help="tokens to generate at most (default: 128)",
    )  # fmt: skip
    sampling.add_argument(
        "--temperature", type=number, default=0.0, metavar="X", help="0 is greedy (default: 0)"
    )
    sampling.add_argument(
        "--top-k", type=integer, default=0, metavar="N", help="keep the N likeliest tokens (0: all)"
    )
    sampling.add_argument(
        "--top-p", type=number, default=1.0, metavar="X",
        help="keep the fewest tokens whose probabilities reach X (default: 1, all)",
    )  # fmt: skip
    sampling.add_argument(
        "--min-p", type=number, default=0.0, metavar="X",
        help="keep tokens at least X times as probable as the likeliest (default: 0, all)",
    )  # fmt: skip
    sampling.add_argument(
        "--seed", type=integer, default=0, metavar="N", help="of the random numbers (default: 0)"
    )
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )  # fmt: skip
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-sequence token"
    )


def _add_shard(commands) -> None:
    command = _add_command(commands, "shard", "Cut a model into one HDF5 file for each rank.")
    command.add_argument("out", metavar="OUT", help="the directory to write; must not exist")
    command.add_argument(
        *TP_FLAGS, type=count, required=True, metavar="N",
        help="ranks to cut the model for",
    )  # fmt: skip
    command.add_argument(
        *EP_FLAGS, type=count, default=1, metavar="N",
        help="ranks to divide the experts of a mixture for (default: 1)",
    )  # fmt: skip
    command.add_argument(
        *CP_FLAGS, type=count, default=1, metavar="N",
        help="context-parallel ranks, which divide the width of a mixture's experts as well "
        "(default: 1)",
    )  # fmt: skip
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the stored weights; float32 is mapped into memory without a copy "
        "(default: float32)",
    )  # fmt: skip
    _add_watch(command)


def _add_inspect(commands) -> None:
    command = _add_command(commands, "inspect", "Say what a model or shard directory holds.")
    command.add_argument(
        "--verify", action="store_true", help="read every weight and check all that can be checked"
    )


def _add_generate(commands) -> None:
    command = _add_command(commands, "generate", "Complete one or more prompts.")
    command.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT",
        help="may be given several times; - takes all of standard input as it is",
    )  # fmt: skip
    command.add_argument("--chat", action="store_true", help="apply the model's chat template")
    command.add_argument(
        "--json", action="store_true", help="print one JSON object a line instead of text"
    )
    _add_chunk(command)
    _add_sampling(command)
    _add_expert_load(command)
    _add_routing(command)
    _add_layout(command)
    _add_watch(command)


def _add_batch(commands) -> None:
    command = _add_command(
        commands,
        "batch",
        "Answer a file of requests, spread over the replicas. Killed or told to stop, the same "
        "command goes on where it ended.",
    )
    command.add_argument(
        "--input", required=True, metavar="IN.jsonl",
        help='lines of {"id": "a", "prompt": "text"} or with "input_ids": [1, 2], and any sampling '
        "field of its own, or in the form of OpenAI's Batch API",
    )  # fmt: skip
    command.add_argument(
        "--output", required=True, metavar="OUT.jsonl",
        help="their answers in the same order; until all are there, OUT.jsonl.journal has them",
    )  # fmt: skip
    command.add_argument(
        "--chat", action="store_true", help="apply the model's chat template to every prompt"
    )
    limits = command.add_argument_group("limits", "What each replica takes on at once.")
    limits.add_argument(
        "--max-num-batched-tokens", type=count, default=2048, metavar="N",
        help="tokens in a step at most, of prompts and answers together (default: 2048)",
    )  # fmt: skip
    limits.add_argument(
        "--max-num-seqs", type=count, default=None, metavar="N",
        help="sequences at a time at most (default: 32, or --max-num-batched-tokens if less)",
    )  # fmt: skip
    limits.add_argument(
        "--kv-cache-memory-bytes", type=size, default=None, metavar="BYTES",
        help="KV cache of a rank at most, such as 2GiB (default: half of what is free on its host, "
        "over the ranks there)",
    )  # fmt: skip
    limits.add_argument(
        "--chunked-prefill-size", type=count, default=None, metavar="N",
        help="take prompts in by at most N tokens a step (default: what a step has left)",
    )  # fmt: skip
    _add_sampling(command)
    _add_expert_load(command)
    _add_layout(command)
    _add_watch(command)


def _add_logits(commands) -> None:
    command = _add_command(commands, "logits", "Score given tokens.")
    command.add_argument(
        "--input", required=True, metavar="IN.jsonl",
        help='lines of {"id": "a", "input_ids": [1, 2]} or {"id": "a", "prompt": "text"}',
    )  # fmt: skip
    command.add_argument(
        "--output", required=True, metavar="OUT.npz",
        help="one float32 array (tokens, vocab) for each id",
    )  # fmt: skip
    command.add_argument(
        "--hidden-states", action="store_true",
        help="also ID.hidden.L, (tokens, hidden): the residual stream entering layer L and, for "
        "the last L, after the final norm",
    )  # fmt: skip
    _add_chunk(command)
    _add_expert_load(command)
    _add_routing(command)
    _add_layout(command)
    _add_watch(command)


def _add_bench(commands) -> None:
    command = _add_command(
        commands, "bench", "Measure speed, against this machine's limits, and memory."
    )
    command.add_argument(
        "--prompt-tokens", type=count, nargs="+", default=[512], metavar="N",
        help="lengths of the prompts, each measured on its own (default: 512)",
    )  # fmt: skip
    command.add_argument(
        "--max-tokens", type=count, default=32, metavar="N",
        help="tokens to generate in each sequence (default: 32)",
    )  # fmt: skip
    command.add_argument(
        "--batch", type=count, nargs="+", default=[1, 8], metavar="N",
        help="sequences of each replica at once (default: 1 8)",
    )  # fmt: skip
    command.add_argument(
        "--repeat", type=count, default=3, metavar="N", help="rounds, for medians (default: 3)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    _add_expert_load(command)
    _add_layout(command)
    _add_watch(command)


def _add_eplb(commands) -> None:
    summary = "Place experts on ranks so that all have about equally much to do."
    command = commands.add_parser("eplb", help=summary, description=summary)
    command.add_argument("stats", metavar="STATS.json", help="the file that --expert-load wrote")
    command.add_argument(
        *EP_FLAGS, type=count, required=True, metavar="N",
        help="ranks that divide the experts",
    )  # fmt: skip
    command.add_argument(
        "--redundant-experts", type=integer, default=0, metavar="N",
        help="copies of experts that a layer has beyond one of each (default: 0)",
    )  # fmt: skip
    command.add_argument(
        "-o", "--output", required=True, metavar="FILE.json",
        help="the file to write, for --expert-placement",
    )  # fmt: skip
