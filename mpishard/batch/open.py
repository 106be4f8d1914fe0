"""Opens a batch job: its files, and what a replica takes on at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpishard.batch.job import BatchJob
from mpishard.communication.group import CallTracker
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.errors import UserError
from mpishard.runtime.agreement import raise_on_all
from mpishard.storage.fingerprint import fingerprint
from mpishard.storage.source import open_source


@contextmanager
def open_batch(
    comm: MPI.Comm,
    path: Path,
    input: str | Path,
    output: str | Path,
    params: SamplingParams,
    compute_dtype: str,
    max_model_len: int | None,
    calls: CallTracker | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    add_bos: bool | None = None,
    ignore_config: Sequence[str] = (),
) -> Iterator[BatchJob | None]:
    """The batch job of the files `input` and `output`, on rank 0 of `comm`, for the model of
    directory `path`, run as `load` is told to; None on the other ranks. Raises UserError, on all
    ranks if on one, as `BatchJob` and `open_source` do."""
    task = None
    with raise_on_all(comm, calls):
        if comm.rank == 0:
            source = open_source(path, ignore_config)
            metadata = {
                "model": fingerprint(source),
                "compute_dtype": compute_dtype,
                "max_model_len": max_model_len or source.config.max_position_embeddings,
                "add_bos": add_bos,
            }
            files = Path(input), Path(output)
            task = BatchJob(*files, params, metadata, chat, chat_template_kwargs)
    with task or nullcontext():
        yield task


def scheduler_config(
    max_num_batched_tokens: int = SchedulerConfig.max_num_batched_tokens,
    max_num_seqs: int | None = None,
    chunked_prefill_size: int | None = None,
    kv_cache_memory_bytes: int | None = None,
) -> SchedulerConfig:
    """What a replica takes on at once in a batch: a step of at most `max_num_batched_tokens`
    tokens, of at most `max_num_seqs` sequences (32, or as many as a step has tokens), prompts by
    pieces of at most `chunked_prefill_size` tokens (or of what a step has left), and
    `kv_cache_memory_bytes` bytes of KV cache on a rank (half of what is free, over the ranks of its
    host). Raises UserError for what would have no effect."""
    sequences = max_num_seqs or min(SchedulerConfig.max_num_seqs, max_num_batched_tokens)
    if sequences > max_num_batched_tokens:
        raise UserError(
            f"--max-num-seqs {sequences} is more than --max-num-batched-tokens "
            f"{max_num_batched_tokens}: "
            "each running sequence feeds a token in a step; make one of them fit the other"
        )
    if chunked_prefill_size is not None and chunked_prefill_size > max_num_batched_tokens:
        raise UserError(
            f"--chunked-prefill-size {chunked_prefill_size} has no effect with "
            f"--max-num-batched-tokens {max_num_batched_tokens}, which is less: leave it out"
        )
    return SchedulerConfig(
        max_num_batched_tokens,
        sequences,
        chunked_prefill_size or max_num_batched_tokens,
        kv_cache_memory_bytes,
    )
