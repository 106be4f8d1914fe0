"""``mpishard batch``: answers a file of requests."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from mpi4py import MPI

from mpishard import options
from mpishard.batch.dispatch import Progress
from mpishard.batch.job import BatchJob
from mpishard.batch.open import open_batch, scheduler_config
from mpishard.batch.run import BatchReport
from mpishard.commands.common import (
    check_outputs,
    load_model,
    sampling_params,
    say,
    say_notices,
    say_totals,
    tracked_expert_load,
)
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.runtime.launch import reaches_terminal

SUMMARY = (
    "Answer a file of requests, spread over the replicas. Killed or told to stop, the same command "
    "goes on where it ended."
)

# The status of a batch that was told to stop and can go on: EX_TEMPFAIL of sysexits.h. Not 143,
# with which launchers end that were killed themselves.
STOPPED = 75
# The status of a batch that is complete, but has no answer that is not an error: EX_DATAERR.
ALL_REFUSED = 65

REPORT_SECONDS = 30.0  # between two lines about the progress of a batch


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    options.add_model(command)
    command.add_argument(
        "--input", required=True, metavar="IN.jsonl",
        help='lines of {"id": "a", "prompt": "text"} or with "input_ids": [1, 2], and any sampling '
        "field of its own, or in the form of OpenAI's Batch API",
    )  # fmt: skip
    command.add_argument(
        "--output", required=True, metavar="OUT.jsonl",
        help="their answers in the same order; until all are there, OUT.jsonl.journal has them",
    )  # fmt: skip
    options.add_chat(command)
    options.add_bos(command)
    limits = command.add_argument_group("limits", "What each replica takes on at once.")
    limits.add_argument(
        "--max-num-batched-tokens", type=options.count, metavar="N",
        default=SchedulerConfig.max_num_batched_tokens,
        help="tokens in a step at most, of prompts and answers together (default: 2048)",
    )  # fmt: skip
    limits.add_argument(
        "--max-num-seqs", type=options.count, default=None, metavar="N",
        help="sequences at a time at most (default: 32, or --max-num-batched-tokens if less)",
    )  # fmt: skip
    limits.add_argument(
        "--kv-cache-memory-bytes", type=options.size, default=None, metavar="BYTES",
        help="KV cache of a rank at most, such as 2GiB (default: half of what is free on its host, "
        "over the ranks there)",
    )  # fmt: skip
    limits.add_argument(
        "--chunked-prefill-size", type=options.count, default=None, metavar="N",
        help="take prompts in by at most N tokens a step (default: what a step has left)",
    )  # fmt: skip
    options.add_sampling(command)
    options.add_expert_load(command)
    options.add_layout(command)
    options.add_watchdog(command)


def run(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard batch``: exits with status 75 if it was told to stop before all was answered,
    which may have been before this call, and with 65 if every line is answered with an error."""
    params = sampling_params(args, world)
    check_outputs(args, world)
    limits = scheduler_config(
        args.max_num_batched_tokens,
        args.max_num_seqs,
        args.chunked_prefill_size,
        args.kv_cache_memory_bytes,
    )
    args.stop_request.listen()  # MPI may have taken these signals for itself
    files = Path(args.model), args.input, args.output, params, args.compute_dtype
    text = args.chat, args.chat_template_kwargs, args.add_bos
    more = args.max_model_len, args.watch.calls, *text, args.ignore_config
    with open_batch(world, *files, *more) as task:
        if task and task.journal.damaged:
            say(f"{task.journal.path}: {task.journal.damaged} damaged lines are done again")
        model = load_model(args, world)
        if model.has_tokenizer:
            say_notices(model, world)
        with tracked_expert_load(args, model, world):
            with _reporter(task) as report:
                outcome = model.answer(task, limits, lambda: args.stop_request.came, report)
            say_totals(
                model,
                _conclusion(args.output, outcome),
                outcome.prompt_tokens,
                outcome.completion_tokens,
                outcome.seconds,
            )
    if not outcome.complete:
        raise SystemExit(STOPPED)
    if outcome.all_refused:
        raise SystemExit(ALL_REFUSED)


@contextmanager
def _reporter(task: BatchJob | None) -> Iterator[Callable[[Progress], None]]:
    """What shows the progress of a batch on rank 0: a bar where standard error reaches a terminal,
    else a line now and then."""
    started = said = perf_counter()

    def write(progress: Progress) -> None:
        nonlocal said
        now = perf_counter()
        if now - said >= REPORT_SECONDS:
            said = now
            say(_pace(progress, now - started))

    if task is None or not reaches_terminal():
        yield write
        return
    from tqdm import tqdm  # here, because only terminals need it

    with tqdm(
        total=len(task), initial=len(task.journal), desc="answering", unit="line", leave=False
    ) as bar:

        def show(progress: Progress) -> None:
            bar.set_postfix_str(
                f"{progress.completion_tokens / (perf_counter() - started):.1f} tokens/s", False
            )
            bar.update(progress.done - bar.n)

        yield show


def _pace(progress: Progress, seconds: float) -> str:
    """How far a batch is after some `seconds`, and how long it will take."""
    left = (progress.total - progress.done) * seconds / max(progress.answered, 1)
    minutes, rest = divmod(round(left), 60)
    return (
        f"{progress.done} of {progress.total} lines answered, "
        f"{progress.completion_tokens / seconds:.1f} tokens/s, "
        f"about {minutes // 60}:{minutes % 60:02}:{rest:02} left"
    )


def _conclusion(output: str, outcome: BatchReport) -> str:
    done = outcome.before + outcome.answered
    before = f", {outcome.before} of them by an earlier run" if outcome.before else ""
    refused = f", {outcome.refused} with an error" if outcome.refused else ""
    if outcome.all_refused:
        return f"{output}: all {done} lines failed, and have an error in place of an answer{before}"
    if outcome.complete:
        return f"{output}: {done} lines answered{before}{refused}"
    return (
        f"told to stop: {done} of {outcome.total} lines are answered, in {output}.journal"
        f"{before}{refused}; the same command goes on from there"
    )
