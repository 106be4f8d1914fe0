"""``mpishard generate``: completes prompts."""

from __future__ import annotations

import argparse
import json
import select
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from mpi4py import MPI

from mpishard import options
from mpishard.api import Model
from mpishard.commands.common import (
    check_outputs,
    load_model,
    progress_bar,
    routing_files,
    sampling_params,
    say,
    say_notices,
    say_summary,
    tracked_expert_load,
)
from mpishard.communication.group import CallTracker
from mpishard.completions import Completion
from mpishard.engine.generate import Timing
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError
from mpishard.parallel.data import assign_requests
from mpishard.runtime.agreement import from_rank_0
from mpishard.storage.input_file import read_text

SUMMARY = "Complete one or more prompts."

STDIN_PATIENCE = 5.0  # seconds


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    options.add_model(command)
    command.add_argument(
        "--prompt", action=AppendPrompt, dest="prompts", default=[], metavar="TEXT",
        help="may be given several times; - takes all of standard input as it is",
    )  # fmt: skip
    command.add_argument(
        "--prompt-file", action=AppendPrompt, dest="prompts", default=[], metavar="FILE",
        help="a prompt of any length, which rank 0 reads; may be given several times",
    )  # fmt: skip
    options.add_chat(command)
    options.add_bos(command)
    command.add_argument(
        "--json", action="store_true", help="print one JSON object a line instead of text"
    )
    options.add_chunked_prefill(command)
    options.add_sampling(command)
    options.add_expert_load(command)
    options.add_routing(command)
    options.add_layout(command)
    options.add_watchdog(command)


def run(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard generate``: streams the text of one prompt; prints several in their order."""
    params = sampling_params(args, world)
    if params.logprobs is not None and not args.json:
        raise UserError(f"--logprobs {params.logprobs} has no effect without --json: give both")
    if args.chat and args.add_bos is not None:
        flag = "--add-bos" if args.add_bos else "--no-add-bos"
        raise UserError(f"{flag} has no effect with --chat, whose template decides: leave it out")
    if args.chat_template_kwargs and not args.chat:
        raise UserError("--chat-template-kwargs has no effect without --chat: leave it out")
    prompts = read_prompts(args.prompts, world, args.watch.calls)
    check_outputs(args, world)
    model = load_model(args, world)
    say_notices(model, world)
    with tracked_expert_load(args, model, world):
        names = [str(place) for place in range(len(prompts))]  # the ids of --json
        with routing_files(args, model, names, world):
            timing, seconds = _generate(args, world, model, params, prompts)
        say_summary(model, timing, seconds)


def _generate(
    args: argparse.Namespace,
    world: MPI.Intracomm,
    model: Model,
    params: SamplingParams,
    prompts: list[str],
) -> tuple[Timing, float]:
    """Print the completions of `prompts`; the time of prefill and decode, and seconds in all."""
    streams = len(prompts) == params.n == 1 and not args.json
    timing, started = Timing(), perf_counter()
    mine = params.n * len(assign_requests(len(prompts), model.mesh))
    with progress_bar(world, 0 if streams else mine, "answers", "answer") as advance:
        completions = model.generate(
            prompts,
            params,
            chat=args.chat,
            chat_template_kwargs=args.chat_template_kwargs,
            on_text=_write_text if streams else None,
            on_finish=lambda place: advance(1),
            timing=timing,
            chunked_prefill_size=args.chunked_prefill_size,
        )
    seconds = perf_counter() - started
    if streams:
        print(flush=True)
    else:
        _print_completions(completions, args.json, params.n)
    return timing, seconds


class AppendPrompt(argparse.Action):
    """Appends the text of --prompt or the name of --prompt-file to one list, in the order of the
    command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = [*(getattr(namespace, self.dest) or []), (self.option_strings[0], values)]
        setattr(namespace, self.dest, given)


def read_prompts(
    given: list[tuple[str, str]], world: MPI.Intracomm, calls: CallTracker
) -> list[str]:
    """The prompts, in the order of the command line. Rank 0 reads files and standard input, which
    the launcher gives to it alone, and hands them to the others."""
    if not given:
        raise UserError(
            "a prompt is required: --prompt TEXT or --prompt-file FILE; see "
            "`mpishard generate --help`"
        )
    if given.count(("--prompt", "-")) > 1:
        raise UserError("--prompt - is given twice, but standard input can be read only once")
    if all(flag == "--prompt" and value != "-" for flag, value in given):
        return [text for _, text in given]
    return from_rank_0(world, lambda: [_read_prompt(*one) for one in given], calls)


def _read_prompt(flag: str, value: str) -> str:
    if flag == "--prompt-file":
        return read_text(flag, Path(value))
    if value != "-":
        return value
    try:
        return _read_stdin().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt -: standard input is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None


def _read_stdin() -> bytes:
    """All of standard input. Says that it waits where nothing comes, because the mpirun of some
    Open MPI 5 keeps it to itself (github.com/openpmix/prrte/issues/2373)."""
    if sys.stdin is None:  # it was closed before the program began
        return b""
    if not select.select([sys.stdin], [], [], STDIN_PATIENCE)[0]:
        say(
            "--prompt -: waiting for standard input, up to its end; if there is one, this mpirun "
            "does not pass it on: give the text itself after --prompt"
        )
    return sys.stdin.buffer.read()


def _print_completions(completions: list[Completion], as_json: bool, n: int) -> None:
    for place, completion in enumerate(completions):
        if as_json:
            said = {"id": place // n, **asdict(completion)}
            if n == 1:
                del said["index"]
            if completion.logprobs is None:
                del said["logprobs"]
            print(json.dumps(said, ensure_ascii=False))
        else:
            print(f"=== {completion.prompt}\n{completion.text}\n")
    sys.stdout.flush()


def _write_text(_: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
