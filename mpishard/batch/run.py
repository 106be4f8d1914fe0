"""A batch job from its beginning to its end, on all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
from mpi4py import MPI

from mpishard.batch.chat import with_text_contents
from mpishard.batch.dispatch import Coordinator, Progress, ReplicaClient
from mpishard.batch.job import BatchJob
from mpishard.batch.requests import BatchRequest, is_error
from mpishard.batch.texts import AnswerTexts
from mpishard.communication.collectives import MIN, all_reduce
from mpishard.communication.group import CollectiveCall
from mpishard.communication.mailbox import Mailbox
from mpishard.communication.mesh import Mesh
from mpishard.engine.generate import check_request, check_token_ids, serve
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.errors import UserError
from mpishard.model import Decoder
from mpishard.sequences.inputs import TokenInput, token_input
from mpishard.tokenizer import Tokenizer

# The part of the memory that is free when a job begins that its caches may take.
CACHE_SHARE = 0.5
LEAST_CACHE = 2**26  # bytes, however little is free

CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class BatchReport:
    """What became of a job, the same on all ranks: `total` lines, of which `before` had been
    answered by an earlier run and `answered` by this one, `refused` of these with an error; tokens
    and seconds are this run's. Unless it is `complete` it was told to stop; run again, it goes on.
    `all_refused` says that it is complete, and that no line has an answer but an error.
    """

    total: int
    before: int
    answered: int
    refused: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    all_refused: bool = False

    @property
    def complete(self) -> bool:
        """Whether every line is answered and the output is there."""
        return self.before + self.answered == self.total


def run(
    decoder: Decoder,
    directory: Path,
    text: Tokenizer | None,
    task: BatchJob | None,
    limits: SchedulerConfig,
    should_stop: Callable[[], bool],
    report: Callable[[Progress], None],
) -> BatchReport:
    """Answer the `task`, which rank 0 has and no other, with the model of `directory` and its
    tokenizer `text`, if it has one.

    A replica works within `limits`; if it has none for the cache, `available_memory` is. All ranks
    stop after a step in which `should_stop` is true on any of them. `report` is called on rank 0.
    Raises UserError, on rank 0 alone, where the disk takes no more."""
    mesh, started = decoder.mesh, perf_counter()
    world = mesh.world.comm
    with CollectiveCall("broadcast", mesh.world):
        left = world.bcast(task and task.left)
    share = -(-left // mesh.dp.size)  # else the first to ask would take all of a small job
    limits = replace(limits, max_num_seqs=max(1, min(limits.max_num_seqs, share)))
    if limits.kv_cache_memory_bytes is None:
        share = int(CACHE_SHARE * available_memory(mesh))
        limits = replace(limits, kv_cache_memory_bytes=max(LEAST_CACHE, share))
    progress = Progress(len(task), len(task.journal)) if task else None
    if left:
        progress = _serve(decoder, directory, text, task, limits, should_stop, report)
    figures = None
    if task and progress:
        all_refused = False
        if not task.left:
            refused = progress.refused == progress.answered
            all_refused = refused and all(is_error(task.journal[p]) for p in range(len(task)))
            task.finish()
        figures = BatchReport(
            progress.total,
            progress.before,
            progress.answered,
            progress.refused,
            progress.prompt_tokens,
            progress.completion_tokens,
            perf_counter() - started,
            all_refused,
        )
    with CollectiveCall("broadcast", mesh.world):
        return world.bcast(figures)


def _serve(
    decoder: Decoder,
    directory: Path,
    text: Tokenizer | None,
    task: BatchJob | None,
    limits: SchedulerConfig,
    should_stop: Callable[[], bool],
    report: Callable[[Progress], None],
) -> Progress | None:
    """Answer what is left of the task; on rank 0 how far that came."""
    mesh = decoder.mesh
    post = Mailbox(mesh.world.comm)
    coordinator = None
    if task:
        leaders = list(range(0, mesh.layout.world_size, mesh.layout.replica_size))
        coordinator = Coordinator(
            task,
            post,
            leaders,
            _encoder(decoder, directory, task, text),
            report,
            AnswerTexts(text),
        )
    eos_ids = frozenset(decoder.config.eos_ids)
    client = ReplicaClient(mesh, post, text, eos_ids, should_stop, coordinator)
    serve(decoder, client, client.answer, limits=limits)
    client.close()
    post.close()
    return coordinator.progress if coordinator else None


def _encoder(
    decoder: Decoder, directory: Path, task: BatchJob, text: Tokenizer | None
) -> Callable[[BatchRequest], TokenInput]:
    """What finds the tokens of a line, or refuses it (UserError)."""

    def encode(line: BatchRequest) -> TokenInput:
        where = f"{task.source} line {line.number}"
        try:
            check_token_ids(decoder, line.params)
            ids = _ids(line, task, directory, text)
            tokens = token_input(decoder.config, ids, line.decoder_input_ids, "the line")
            check_request(decoder, ids, "the prompt")
            if tokens.encoder_ids:
                check_request(decoder, tokens.ids, '"decoder_input_ids"')
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return tokens

    return encode


def _ids(line: BatchRequest, task: BatchJob, directory: Path, text: Tokenizer | None) -> list[int]:
    prompt, chat = line.prompt, task.chat
    variables = {**task.chat_template_kwargs, **line.chat_template_kwargs}
    are_ids = isinstance(prompt, list) and all(isinstance(one, int) for one in prompt)
    needs_text = line.params.stop or not line.params.skip_special_tokens or line.echo
    if text is None and (not are_ids or needs_text):
        text = Tokenizer(directory)  # which says that there is none
    if are_ids and chat:
        raise UserError("a chat needs the text that opens it, not token ids; omit --chat")
    if line.chat_template_kwargs and not chat and (are_ids or isinstance(prompt, str)):
        raise UserError("chat_template_kwargs have no effect without --chat: leave them out")
    if are_ids or text is None:
        return prompt  # type: ignore[return-value]
    if isinstance(prompt, str) and not chat:
        return text.encode(prompt)
    if isinstance(prompt, list) and not text.chat_template.takes_parts(variables.get("tools")):
        prompt = with_text_contents(prompt)  # type: ignore[arg-type]
    return text.chat(prompt, variables)  # type: ignore[arg-type]


def available_memory(mesh: Mesh) -> int:
    """The bytes of memory that are free for each rank, the fewest of any: its host's, and those
    that a batch system has set as its limit, over the ranks there."""
    world = mesh.world
    node = world.comm.Split_type(MPI.COMM_TYPE_SHARED)
    free = np.array(_free_memory() // node.size, np.int64)
    node.Free()
    return int(all_reduce(free, world, MIN))


def _free_memory() -> int:
    """The bytes of memory that this process and those beside it may still take."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, KeyError, ValueError):  # not Linux
        metadata = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(metadata["MemAvailable"].split()[0])
    with suppress(OSError):
        own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        free = min([free, *_group_memory(CONTROL_GROUPS / own.lstrip("/"))])
    return max(0, free)


def _group_memory(group: Path) -> Iterator[int]:
    """The bytes that the control group of a directory, and those above it, still allow."""
    for directory in (group, *group.parents):
        with suppress(OSError, ValueError):  # no limit, or none here
            limit = int((directory / "memory.max").read_text())
            yield limit - int((directory / "memory.current").read_text())
