"""``mpishard logits``: scores given tokens."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

from mpishard import options
from mpishard.api import Model
from mpishard.batch.fields import check_fields, decoder_ids_of, name_of, prompt_of, read_object
from mpishard.commands.common import (
    check_outputs,
    load_model,
    progress_bar,
    routing_files,
    say_notices,
    say_summary,
    tracked_expert_load,
)
from mpishard.engine.generate import Timing
from mpishard.errors import UserError, brief
from mpishard.runtime.agreement import raise_on_all
from mpishard.scoring import LogitsOutput
from mpishard.sequences.inputs import TokenInput
from mpishard.storage.input_file import BOM, LinesLook, open_input
from mpishard.storage.output_file import check_output, whole_file
from mpishard.storage.parsing import parse_json

SUMMARY = "Score given tokens."

FIELDS = ("id", "input_ids", "prompt", "decoder_input_ids")  # of a line of sequences to score

LONGEST_NAME = 60_000  # bytes, with some that are added: the zip format has two for the length


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    options.add_model(command)
    command.add_argument(
        "--input", required=True, metavar="IN.jsonl",
        help='lines of {"id": "a", "input_ids": [1, 2]} or {"id": "a", "prompt": "text"}, with '
        '"decoder_input_ids" for a model with an encoder',
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
    options.add_bos(command)
    options.add_chunked_prefill(command)
    options.add_expert_load(command)
    options.add_routing(command)
    options.add_layout(command)
    options.add_watchdog(command)


def run(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard logits``: every array is written as soon as it is there; the file appears under
    its name when it is complete."""
    lines = _read_sequences(Path(args.input), args.hidden_states)
    with raise_on_all(world, args.watch.calls):
        if world.rank == 0:
            check_output("--output", Path(args.output), Path(args.input))
    check_outputs(args, world)
    model = load_model(args, world)
    with tracked_expert_load(args, model, world):
        if any(isinstance(line["prompt"], str) for _, line in lines):
            say_notices(model, world)
        sequences = [_encode_line(model, line, where) for where, line in lines]
        names = [line["id"] for _, line in lines]
        with routing_files(args, model, names, world):
            started = perf_counter()
            scores = model.score(sequences, args.hidden_states, args.chunked_prefill_size)
            with progress_bar(world, len(sequences), "scoring", "sequence") as advance:
                if world.rank == 0:
                    _write_scores(Path(args.output), names, scores, advance)
                else:
                    for _ in scores:
                        pass
            seconds = perf_counter() - started
        tokens = (
            sum(len(ids) for one in sequences for ids in one) if world.rank == 0 else 0
        )  # once for all replicas
        say_summary(model, Timing(prefill_tokens=tokens, prefill_seconds=seconds), seconds)


def _read_sequences(path: Path, hidden_states: bool) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a JSONL file of sequences to score, each with the words for where it stands;
    UserError for a line that is not one, or whose arrays would have the names of another's."""
    lines, ids, look = [], set(), LinesLook()
    with open_input("--input", path) as file:
        contents = file.read().removeprefix(BOM).split(b"\n")
    for content in contents:
        if content.strip():
            look.take(content, bool(look.objects) or _is_object(content))
    if problem := look.problem("score"):
        raise UserError(f"--input {path} {problem}")
    for number, content in enumerate(contents, 1):
        if content.strip():
            where = f"{path} line {number}"
            line = _parse_line(content, where)
            if line["id"] in ids:
                raise UserError(f"{where} has the id {brief(repr(line['id']))} of an earlier line")
            ids.add(line["id"])
            lines.append((where, line))
    for where, line in lines:
        before, hidden, _ = line["id"].rpartition(".hidden.")
        if hidden_states and hidden and before in ids:
            raise UserError(
                f"{where}: the id {brief(repr(line['id']))} is also the name of a hidden state of "
                f"{brief(repr(before))}"
            )
    return lines


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _parse_line(text: bytes, where: str) -> dict[str, Any]:
    """The id of a line, as a string, and its prompt."""
    line = read_object(text, where)
    name = str(name_of(line, "id", where))
    _check_array_name(name, where)
    check_fields(line, FIELDS, where)
    return {
        "id": name,
        "prompt": prompt_of(line, where),
        "decoder_input_ids": decoder_ids_of(line, where),
    }


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


def _encode_line(model: Model, line: dict[str, Any], where: str) -> TokenInput:
    try:
        return model.input(model.encode(line["prompt"]), line["decoder_input_ids"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _write_scores(
    target: Path, names: list[str], scores: Iterator[LogitsOutput | None], advance: Any
) -> None:
    """Write the .npz archive `target`, which bears another name until it is complete."""
    try:
        with whole_file(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, score in zip(names, scores, strict=True):
                assert score is not None  # on this rank they all arrive
                _write_array(archive, name, score.logits)
                for layer, x_SD in enumerate(score.hidden_states):
                    _write_array(archive, f"{name}.hidden.{layer}", x_SD)
                advance(1)
    except OSError as error:
        raise UserError(f"--output {target} cannot be written: {error.strerror}") from None


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Add one float32 array to an .npz archive, as numpy.savez does, without the others."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array.astype(np.float32, copy=False), allow_pickle=False)
