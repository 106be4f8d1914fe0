"""What the commands do. Results go to standard output or the output file, everything else to
standard error, from one rank only."""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from math import lcm
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI
from tqdm import tqdm

from mpishard import bench as benchmark
from mpishard.api import (
    Completion,
    LogitsOutput,
    Model,
    load,
    open_batch,
    raise_on_all,
    scheduler_config,
)
from mpishard.batch.dispatch import Progress
from mpishard.batch.job import BatchJob, check_output
from mpishard.batch.requests import check_fields, name_of, prompt_of, read_object
from mpishard.batch.run import BatchReport
from mpishard.communication.collectives import MAX, all_reduce, barrier
from mpishard.config.layout import LAYOUT_OPTIONS
from mpishard.engine.generate import Timing
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError, brief
from mpishard.expert_report import (
    load_report,
    load_table,
    placement_summary,
    read_loads,
    rebalance,
)
from mpishard.parallel.data import assign_requests
from mpishard.parallel.expert_load import ExpertLoad
from mpishard.runtime.launch import reaches_terminal, threads_per_rank
from mpishard.storage.convert import Conversion
from mpishard.storage.inspection import describe, stored_bytes, verify
from mpishard.storage.source import open_source

FIELDS = ("id", "input_ids", "prompt")  # of a line of sequences to score
LONGEST_NAME = 60_000  # bytes, with some that are added: the zip format has two for the length

STDIN_PATIENCE = 5.0  # seconds

# The status of a batch that was told to stop and can go on: EX_TEMPFAIL of sysexits.h. Not 143,
# with which launchers end that were killed themselves.
STOPPED = 75

REPORT_SECONDS = 30.0  # between two lines about the progress of a batch


def shard(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard shard``: the ranks share the files to be written."""
    with raise_on_all(world, args.watch.calls):
        ranks = lcm(args.tp * args.cp, args.ep)
        source = open_source(args.model)
        conversion = Conversion(source, args.out, args.tp, args.dtype, args.ep, ranks)
        if world.rank == 0:
            conversion.prepare()
    with _bar(world, conversion.worker_bytes(world.rank, world.size), "writing", "B") as advance:
        conversion.write(world.rank, world.size, advance)
    barrier(args.watch.world)
    with raise_on_all(world, args.watch.calls):
        if world.rank == 0:
            conversion.finish()
    if world.rank == 0:
        ranks = conversion.sharding.ranks
        _say(f"{args.out}: {conversion.total_bytes / 1e6:.1f} MB for {ranks} ranks")


def inspect(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard inspect``: one rank does it, however many were started."""
    if world.rank != 0:
        return
    source = open_source(args.model)
    print("\n".join(describe(source)), flush=True)
    if args.verify:
        with _bar(world, stored_bytes(source), "verifying", "B") as advance:
            verify(source, advance)
        print("verified: every element of every weight is there and sound")


def generate(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard generate``: streams the text of one prompt; prints several in their order."""
    params = _sampling_params(args)
    model = _load(args, world)
    load = _count_load(args, model, world)
    prompts = _read_prompts(args.prompt, world)
    names = [str(place) for place in range(len(prompts))]  # the ids of --json
    _watch_routing(args, model, names, world)
    streams = len(prompts) == 1 and not args.json
    timing, started = Timing(), perf_counter()
    mine = len(assign_requests(len(prompts), model.mesh))
    with _bar(world, 0 if streams else mine, "prompts", "prompt") as advance:
        completions = model.generate(
            prompts,
            params,
            chat=args.chat,
            on_text=_write_text if streams else None,
            on_finish=lambda place: advance(1),
            timing=timing,
            chunked_prefill_size=args.chunked_prefill_size,
        )
    seconds = perf_counter() - started
    if streams:
        print(flush=True)
    else:
        _print_completions(completions, args.json)
    _write_routing(args, model, names, world)
    _summary(model, timing, seconds)
    _report_load(args, model, load)


def batch(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard batch``: exits with status 75 if it was told to stop before all was answered,
    which may have been before this call."""
    params = _sampling_params(args)
    limits = scheduler_config(
        args.max_num_batched_tokens,
        args.max_num_seqs,
        args.chunked_prefill_size,
        args.kv_cache_memory_bytes,
    )
    args.stop_request.listen()  # MPI may have taken these signals for itself
    files = Path(args.model), args.input, args.output, params, args.compute_dtype
    with open_batch(world, *files, args.max_model_len, args.watch.calls, args.chat) as task:
        if task and task.journal.damaged:
            _say(f"{task.journal.path}: {task.journal.damaged} damaged lines are done again")
        model = _load(args, world)
        load = _count_load(args, model, world)
        with _reporter(task) as report:
            outcome = model.answer(task, limits, lambda: args.stop_request.came, report)
    count = world.rank == 0  # once for all replicas, whose prompts and answers mix in every step
    tokens = outcome.prompt_tokens * count, outcome.completion_tokens * count
    seconds = outcome.seconds
    _summary(model, Timing(tokens[0], seconds, tokens[1], seconds), seconds)
    if world.rank == 0:
        _say(_conclusion(args.output, outcome))
    _report_load(args, model, load)
    if not outcome.complete:
        raise SystemExit(STOPPED)


def logits(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard logits``: every array is written as soon as it is there; the file appears under
    its name when it is complete."""
    lines = _read_sequences(Path(args.input), args.hidden_states)
    with raise_on_all(world, args.watch.calls):
        if world.rank == 0:
            check_output("--output", Path(args.output), Path(args.input))
    model = _load(args, world)
    load = _count_load(args, model, world)
    sequences = [_encode_line(model, line, where) for where, line in lines]
    names = [line["id"] for _, line in lines]
    _watch_routing(args, model, names, world)
    started = perf_counter()
    scores = model.logits(sequences, args.hidden_states, args.chunked_prefill_size)
    with _bar(world, len(sequences), "scoring", "sequence") as advance:
        if world.rank == 0:
            _write_scores(Path(args.output), names, scores, advance)
        else:
            for _ in scores:
                pass
    seconds = perf_counter() - started
    _write_routing(args, model, names, world)
    tokens = sum(map(len, sequences)) if world.rank == 0 else 0  # counted once for all replicas
    _summary(model, Timing(prefill_tokens=tokens, prefill_seconds=seconds), seconds)
    _report_load(args, model, load)


def bench(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard bench``: prints one table, or one JSON object."""
    model = _load(args, world)
    load = _count_load(args, model, world)
    report = benchmark.measure(model, args.prompt_tokens, args.max_tokens, args.batch, args.repeat)
    if world.rank == 0:
        print(json.dumps(report) if args.json else benchmark.table(report))
    _report_load(args, model, load)


def eplb(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard eplb``: one rank does it, however many were started."""
    if world.rank != 0:
        return
    source, target = Path(args.stats), Path(args.output)
    loads = read_loads(source)
    check_output("--output", target, source, "what is read")
    placement = rebalance(loads, args.ep, args.redundant_experts)
    _write_json("--output", target, placement.content)
    _say(f"{target}: {placement_summary(loads, placement)}")


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    """How tokens are sampled; refuses a --stop that would stop everything."""
    if "" in args.stop:
        raise UserError("--stop '' is empty: give the text that ends an answer")
    return SamplingParams(**{one.name: getattr(args, one.name) for one in fields(SamplingParams)})


def _load(args: argparse.Namespace, world: MPI.Intracomm) -> Model:
    """The model, and one line on how it runs."""
    model = load(
        args.model,
        world,
        args.tp,
        args.dp,
        args.compute_dtype,
        args.line,
        cp=args.cp,
        max_model_len=args.max_model_len,
        watch=args.watch,
        **{name: getattr(args, name) for name in LAYOUT_OPTIONS},
    )
    if world.rank == 0:
        vendor, version = MPI.get_vendor()
        _say(
            f"{model.path}: {model.mesh.layout}, {args.compute_dtype}, threads per rank: "
            f"{threads_per_rank()}, {vendor} {'.'.join(map(str, version))}"
        )
    return model


def _count_load(args: argparse.Namespace, model: Model, world: MPI.Intracomm) -> ExpertLoad | None:
    """What --expert-load counts, if it is given; the file that it names can be written."""
    if args.expert_load is None:
        return None
    model.check_has_experts("--expert-load")
    with raise_on_all(world, args.watch.calls):
        if args.expert_load and world.rank == 0:
            check_output("--expert-load", Path(args.expert_load))
    return model.track_expert_load()


def _watch_routing(
    args: argparse.Namespace, model: Model, names: list[str], world: MPI.Intracomm
) -> None:
    """The beginning of --record-routing and --replay-routing, for requests of these names."""
    record, replay = args.record_routing, args.replay_routing
    for flag, path in (("--record-routing", record), ("--replay-routing", replay)):
        if path is not None:
            model.check_has_experts(flag)
    if record is not None and replay is not None:
        raise UserError(
            f"--record-routing {record} would write what --replay-routing {replay} reads: leave "
            "one of them out"
        )
    if record is not None:
        with raise_on_all(world, args.watch.calls):
            if world.rank == 0:
                check_output("--record-routing", Path(record))
        model.record_routing()
    if replay is not None:
        model.replay_routing(replay, names)


def _write_routing(
    args: argparse.Namespace, model: Model, names: list[str], world: MPI.Intracomm
) -> None:
    """The end of --record-routing."""
    if args.record_routing is None:
        return
    with raise_on_all(world, args.watch.calls):
        try:
            model.write_routing(args.record_routing, names)
        except OSError as error:
            raise UserError(
                f"--record-routing {args.record_routing} cannot be written: {error.strerror}"
            ) from None


def _report_load(args: argparse.Namespace, model: Model, load: ExpertLoad | None) -> None:
    """The end of --expert-load."""
    if load is None:
        return
    report = load_report(model, load)
    if model.mesh.world.rank == 0:
        _say(load_table(report))
        if args.expert_load:
            _write_json("--expert-load", Path(args.expert_load), report)


def _write_json(flag: str, target: Path, content: dict[str, Any]) -> None:
    try:
        target.write_text(json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(f"{flag} {target} cannot be written: {error.strerror}") from None


def _read_prompts(given: list[str], world: MPI.Intracomm) -> list[str]:
    """The prompts, ``-`` replaced by standard input, which the launcher gives to rank 0 only."""
    if "-" not in given:
        return given
    if given.count("-") > 1:
        raise UserError("--prompt - is given twice, but standard input can be read only once")
    content: bytes = world.bcast(_read_stdin() if world.rank == 0 else None)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt -: standard input is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    return [text if prompt == "-" else prompt for prompt in given]


def _read_stdin() -> bytes:
    """All of standard input. Says that it waits where nothing comes, because the mpirun of some
    Open MPI 5 keeps it to itself (github.com/openpmix/prrte/issues/2373)."""
    if sys.stdin is None:  # it was closed before the program began
        return b""
    if not select.select([sys.stdin], [], [], STDIN_PATIENCE)[0]:
        _say(
            "--prompt -: waiting for standard input, up to its end; if there is one, this mpirun "
            "does not pass it on: give the text itself after --prompt"
        )
    return sys.stdin.buffer.read()


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
            _say(_pace(progress, now - started))

    if task is None or not reaches_terminal():
        yield write
        return
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
    if outcome.complete:
        return f"{output}: {done} lines answered{before}{refused}"
    return (
        f"told to stop: {done} of {outcome.total} lines are answered, in {output}.journal"
        f"{before}{refused}; the same command goes on from there"
    )


def _print_completions(completions: list[Completion], as_json: bool) -> None:
    for place, completion in enumerate(completions):
        if as_json:
            print(json.dumps({"id": place, **asdict(completion)}, ensure_ascii=False))
        else:
            print(f"=== {completion.prompt}\n{completion.text}\n")
    sys.stdout.flush()


def _read_sequences(path: Path, hidden_states: bool) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a JSONL file of sequences to score, each with the words for where it stands;
    UserError for a line that is not one, or whose arrays would have the names of another's."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--input {path} cannot be read: {problem}") from None
    lines, ids = [], set()
    for number, text in enumerate(content.split("\n"), 1):
        if text.strip():
            where = f"{path} line {number}"
            line = _parse_line(text, where)
            if line["id"] in ids:
                raise UserError(f"{where} has the id {brief(repr(line['id']))} of an earlier line")
            ids.add(line["id"])
            lines.append((where, line))
    if not lines:
        raise UserError(f"--input {path} has no line to score")
    for where, line in lines:
        before, hidden, _ = line["id"].rpartition(".hidden.")
        if hidden_states and hidden and before in ids:
            raise UserError(
                f"{where}: the id {brief(repr(line['id']))} is also the name of a hidden state of "
                f"{brief(repr(before))}"
            )
    return lines


def _parse_line(text: str, where: str) -> dict[str, Any]:
    """One line's fields, its id as a string."""
    line = read_object(text, where)
    name = str(name_of(line, "id", where))
    _check_array_name(name, where)
    check_fields(line, FIELDS, where)
    prompt_of(line, where)
    return line | {"id": name}


def _check_array_name(name: str, where: str) -> None:
    """Refuse a name that a .npz archive cannot have (UserError)."""
    problem = ""
    try:
        if len(name.encode()) > LONGEST_NAME:
            problem = f"it has more than {LONGEST_NAME} bytes"
    except UnicodeEncodeError:
        problem = "it is not Unicode"
    if "\0" in name:
        problem = "it has a NUL"
    if problem:
        raise UserError(f'{where}: the "id" {brief(repr(name))} cannot name an array: {problem}')


def _encode_line(model: Model, line: dict[str, Any], where: str) -> list[int]:
    given = line["input_ids"] if line.get("prompt") is None else line["prompt"]
    try:
        ids = model.encode(given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    model.check(ids, where)
    return ids


def _write_scores(
    target: Path, names: list[str], scores: Iterator[LogitsOutput | None], advance: Any
) -> None:
    """Write the .npz archive `target`, which bears another name until it is complete."""
    temporary = target.with_name(target.name + ".incomplete")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, score in zip(names, scores, strict=True):
                assert score is not None  # on this rank they all arrive
                _write_array(archive, name, score.logits)
                for layer, x_SD in enumerate(score.hidden):
                    _write_array(archive, f"{name}.hidden.{layer}", x_SD)
                advance(1)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"--output {target} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Add one float32 array to an .npz archive, as numpy.savez does, without the others."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array.astype(np.float32, copy=False), allow_pickle=False)


def _write_text(_: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _summary(model: Model, timing: Timing, seconds: float) -> None:
    """One line on how it went, of all replicas together; time in communication is rank 0's."""
    mesh = model.mesh
    share = 100 * mesh.ledger.seconds / seconds
    tokens = np.array([timing.prefill_tokens, timing.decode_tokens])
    longest = np.array([timing.prefill_seconds, timing.decode_seconds])
    prompt, generated = all_reduce(tokens, mesh.dp)
    prompt_seconds, generation_seconds = all_reduce(longest, mesh.dp, MAX)
    peak = model.peak_memory()
    if mesh.world.rank != 0:
        return
    parts = [_rate("prompt", prompt, prompt_seconds)]
    if generated:
        parts.append(_rate("generation", generated, generation_seconds))
    parts.append(f"communication: {share:.0f} % of the time")
    parts.append(f"peak memory: at most {peak / 2**20:.0f} MiB per rank")
    _say("; ".join(parts))


def _rate(what: str, tokens: int, seconds: float) -> str:
    return f"{what}: {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


@contextmanager
def _bar(world: MPI.Intracomm, total: int, what: str, unit: str) -> Iterator[Any]:
    """A progress bar of rank 0's work where standard error reaches a terminal; yields what
    advances it."""
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        leave=False,
        disable=world.rank != 0 or total == 0 or not reaches_terminal(),
    ) as bar:
        yield bar.update
