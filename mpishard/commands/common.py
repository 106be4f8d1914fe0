"""What commands do alike: load a model, count and record beside it, report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpishard.api import Model, load
from mpishard.commands.expert_load import load_report, load_table
from mpishard.communication.collectives import MAX, all_reduce
from mpishard.config.layout import LAYOUT_OPTIONS
from mpishard.engine.generate import Timing
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError
from mpishard.runtime.agreement import from_rank_0, raise_on_all
from mpishard.runtime.floating_point import KINDS, seen_here
from mpishard.runtime.launch import reaches_terminal, threads_per_rank
from mpishard.storage.generation_config import read_sampling_defaults
from mpishard.storage.output_file import check_output


def sampling_params(args: argparse.Namespace, world: MPI.Intracomm) -> SamplingParams:
    """How tokens are sampled: as typed, else as --generation-config says, which rank 0 reads.
    Refuses a --stop that would stop everything."""
    if "" in args.stop:
        raise UserError("--stop '' is empty: give the text that ends an answer")
    defaults: dict[str, Any] = {}
    if args.generation_config != "none":
        is_auto = args.generation_config == "auto"
        path = Path(args.model if is_auto else args.generation_config)
        defaults = from_rank_0(world, lambda: read_sampling_defaults(path), args.watch.calls)
    typed = {one.name: getattr(args, one.name) for one in fields(SamplingParams)}
    return SamplingParams(
        **defaults | {name: value for name, value in typed.items() if value is not None}
    )


def load_model(args: argparse.Namespace, world: MPI.Intracomm) -> Model:
    """The model, and one line on how it runs."""
    model = load(
        args.model,
        world,
        args.tp,
        args.dp,
        args.compute_dtype,
        cp=args.cp,
        max_model_len=args.max_model_len,
        add_bos=getattr(args, "add_bos", None),
        ignore_config=args.ignore_config,
        watch=args.watch,
        **{name: getattr(args, name) for name in LAYOUT_OPTIONS},
    )
    if world.rank == 0:
        vendor, version = MPI.get_vendor()
        say(
            f"{model.path}: {model.mesh.layout}, {args.compute_dtype}, threads per rank: "
            f"{threads_per_rank()}, {vendor} {'.'.join(map(str, version))}"
            f"{''.join(f'; {notice}' for notice in model.notices)}"
        )
    return model


def say_notices(model: Model, world: MPI.Intracomm) -> None:
    """Say once what the user may want to know of the model's tokenizer."""
    for notice in model.text.notices if world.rank == 0 and model.has_tokenizer else ():
        say(notice)


def check_outputs(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """Refuse files that --expert-load and --record-routing cannot write, before the model is
    loaded; rank 0 will write them."""

    def check() -> None:
        for flag in ("--expert-load", "--record-routing"):
            if target := getattr(args, flag[2:].replace("-", "_"), None):
                check_output(flag, Path(target))

    from_rank_0(world, check, args.watch.calls)


@contextmanager
def tracked_expert_load(
    args: argparse.Namespace, model: Model, world: MPI.Intracomm
) -> Iterator[None]:
    """With --expert-load: counts the load of experts within, and reports it afterwards."""
    if args.expert_load is None:
        yield
        return
    model.check_has_experts("--expert-load")
    load = model.track_expert_load()
    yield
    report = load_report(model, load)
    if world.rank == 0:
        say(load_table(report))
        if args.expert_load:
            write_json("--expert-load", Path(args.expert_load), report)


@contextmanager
def routing_files(
    args: argparse.Namespace, model: Model, names: list[str], world: MPI.Intracomm
) -> Iterator[None]:
    """With --record-routing: records the routing of requests of these names within, and writes it
    afterwards. With --replay-routing: replays it."""
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
        model.record_routing()
    if replay is not None:
        model.replay_routing(replay, names)
    yield
    if record is None:
        return
    with raise_on_all(world, args.watch.calls):
        try:
            model.write_routing(record, names)
        except OSError as error:
            raise UserError(
                f"--record-routing {record} cannot be written: {error.strerror}"
            ) from None


def write_json(flag: str, target: Path, content: dict[str, Any]) -> None:
    try:
        target.write_text(json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(f"{flag} {target} cannot be written: {error.strerror}") from None


def say_overflow(model: Model) -> None:
    """One line if numbers left the range of their type on any rank, without which a result that is
    wrong would look like any other."""
    seen = all_reduce(seen_here(), model.mesh.world, MAX)
    if model.mesh.world.rank == 0 and seen.any():
        what = " and ".join(kind for kind, was in zip(KINDS, seen, strict=True) if was)
        is_widest = model.decoder.dtype == np.float64
        wider = "" if is_widest else "; --compute-dtype float64 has a wider range"
        say(
            f"{what} in {model.decoder.dtype} arithmetic: results may be wrong; `mpishard inspect "
            f"{model.path} --verify` says whether weights are not finite{wider}"
        )


def say_summary(model: Model, timing: Timing, seconds: float) -> None:
    """One line on how it went, of all replicas together; time in communication is rank 0's."""
    mesh = model.mesh
    share = 100 * mesh.ledger.seconds / seconds
    tokens = np.array([timing.prefill_tokens, timing.decode_tokens])
    longest = np.array([timing.prefill_seconds, timing.decode_seconds])
    prompt, generated = all_reduce(tokens, mesh.dp)
    prompt_seconds, generation_seconds = all_reduce(longest, mesh.dp, MAX)
    peak = model.peak_memory()
    say_overflow(model)
    if mesh.world.rank != 0:
        return
    parts = [_rate("prefill", prompt, prompt_seconds)]
    if generated:
        parts.append(_rate("decode", generated, generation_seconds))
    say("; ".join([*parts, _cost(share, peak)]))


def say_totals(model: Model, conclusion: str, prompt: int, generated: int, seconds: float) -> None:
    """One line of the totals of a batch, in which prefill and decode share their steps, behind its
    `conclusion`."""
    share, peak = 100 * model.mesh.ledger.seconds / seconds, model.peak_memory()
    say_overflow(model)
    if model.mesh.world.rank == 0:
        tokens = f"{prompt} prompt tokens and {generated} completion tokens in {seconds:.1f} s"
        rate = f"{generated / seconds:.1f} completion tokens/s"
        say("; ".join([conclusion, f"{tokens}, {rate}", _cost(share, peak)]))


def _cost(share: float, peak: int) -> str:
    return (
        f"communication: {share:.0f} % of the time; "
        f"peak memory: at most {peak / 2**20:.0f} MiB per rank"
    )


def _rate(what: str, tokens: int, seconds: float) -> str:
    return f"{what}: {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s"


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


@contextmanager
def progress_bar(world: MPI.Intracomm, total: int, what: str, unit: str) -> Iterator[Any]:
    """A progress bar of rank 0's work where standard error reaches a terminal; yields what
    advances it."""
    if world.rank != 0 or total == 0 or not reaches_terminal():
        yield lambda _: None
        return
    from tqdm import tqdm  # here, because only terminals need it

    with tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", leave=False) as bar:
        yield bar.update
