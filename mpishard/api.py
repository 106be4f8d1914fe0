"""The Python interface: load a model under a communicator and a layout, generate, score.

    import mpishard

    model = mpishard.load("data/cpython-4m")
    params = mpishard.SamplingParams(max_tokens=32)  # greedy, unless it has a temperature
    for completion in model.generate(["def read(self", "class Set"], params):
        print(completion.text)

That is one rank, without mpirun. On several, hand the communicator over and say how it is divided;
each rank then holds its part of the model, and every call below is collective: all ranks of the
communicator make it, in the same order and with the same arguments.

    # mpirun -n 4 python -m mpi4py script.py
    import mpishard
    from mpi4py import MPI

    comm = MPI.COMM_WORLD  # or any other intracommunicator
    model = mpishard.load("data/cpython-4m", comm, tp=2, dp=2)
    completions = model.generate(["def read(self", "class Set"])  # the same on all ranks
    for scores in model.logits([[1, 2, 3], [4, 5]]):  # on rank 0; None on the others
        if scores is not None:
            print(scores.logits.shape)
    report = model.batch("in.jsonl", "out.jsonl", params)

What depends on a rank's own files fails on all ranks if it fails on one. What else fails on one
rank alone would leave the others waiting for it: ``python -m mpi4py`` ends them too, and so does
`mpishard.runtime.launch.run`, which also gives each rank its share of the cores. Without that, set
OPENBLAS_NUM_THREADS: every rank would otherwise start as many threads as there are cores.

Where something hangs, or might, a watch says on which rank and in which line:

    with mpishard.Watchdog(comm, timeout=600, check_collectives=True) as watch:
        model = mpishard.load("data/cpython-4m", comm, tp=2, dp=2, watch=watch)
        completions = model.generate(["def read(self", "class Set"])
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpishard.batch.dispatch import Progress
from mpishard.batch.job import BatchJob
from mpishard.batch.open import open_batch, scheduler_config
from mpishard.batch.run import BatchReport, run
from mpishard.communication.collectives import all_reduce
from mpishard.communication.group import CallTracker
from mpishard.communication.mesh import Mesh
from mpishard.completions import Completion, complete
from mpishard.config.layout_checks import check_experts
from mpishard.config.model_config import MAX_POSITIONS, ModelConfig
from mpishard.engine.generate import Timing, check_request, check_token_ids
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.errors import UserError, WrongRanks
from mpishard.layout_resolution import check_arguments, read_placement, resolve_layout
from mpishard.model import Decoder
from mpishard.parallel.expert_load import ExpertLoad
from mpishard.parallel.router_replay import RoutingRecorder, replay_layer
from mpishard.prompts import Prompt, as_prompts
from mpishard.runtime.agreement import raise_on_all
from mpishard.runtime.launch import launcher
from mpishard.runtime.malloc import keep_freed_memory
from mpishard.runtime.same_model import open_on_all
from mpishard.runtime.watchdog import Watchdog
from mpishard.scoring import LogitsOutput, score_sequences
from mpishard.sequences.inputs import TokenInput, token_input
from mpishard.storage.generation_config import read_sampling_defaults
from mpishard.storage.routing_file import read_routing, write_routing
from mpishard.storage.routing_trace import RoutingTrace
from mpishard.storage.source import notices
from mpishard.storage.weights import load_weights
from mpishard.tokenizer import (
    Tokenizer,
    has_tokenizer,
)

DTYPES = {"float32": np.float32, "float64": np.float64}


@dataclass
class Model:
    """A model loaded on this rank, and the mesh it is divided over."""

    path: Path
    config: ModelConfig
    mesh: Mesh
    decoder: Decoder
    routing_recorder: RoutingRecorder | None = None
    routing_trace: RoutingTrace | None = None
    add_bos: bool | None = None
    notices: tuple[str, ...] = ()  # what a user should know of the checkpoint, a sentence each

    @cached_property
    def text(self) -> Tokenizer:
        """The model's tokenizer; UserError if it has none."""
        return Tokenizer(self.path, self.add_bos, self.config.max_position_embeddings)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model can take and give text."""
        return has_tokenizer(self.path)

    def encode(
        self,
        prompt: Prompt,
        chat: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a prompt, which token ids already are; with `chat`, of the conversation
        that a text opens, in a template that is given `chat_template_kwargs`. Raises UserError as
        `Tokenizer` does, and TypeError for ids that are not integers."""
        if chat_template_kwargs and not chat:
            raise UserError("chat_template_kwargs have no effect without chat: leave them out")
        (given,) = as_prompts([prompt])
        if isinstance(given, str):
            if chat:
                return self.text.chat(given, chat_template_kwargs)
            return self.text.encode(given)
        if chat:
            raise UserError("chat takes the text that opens a conversation, not token ids")
        return given

    def check(self, ids: Sequence[int], what: str) -> None:
        """Refuse token ids that the model cannot take (UserError); `what` names them."""
        check_request(self.decoder, list(ids), what)

    def input(
        self, ids: list[int], decoder_ids: Sequence[int] | None = None, what: str = "the prompt"
    ) -> TokenInput:
        """What the model makes of the token ids of a prompt, and of those that the decoder beside
        an encoder is to begin with. Refuses what it cannot take (UserError); `what` names it."""
        tokens = token_input(self.config, ids, decoder_ids, what)
        self.check(ids, what)
        if tokens.encoder_ids:
            self.check(tokens.ids, f"{what}'s decoder_input_ids")
        return tokens

    def _inputs(
        self,
        prompts: Sequence[Prompt],
        decoder_input_ids: Sequence[Sequence[int]] | None,
        what: str,
        chat: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[TokenInput]:
        """The tokens of prompts that the model can take; `what` names them in a UserError."""
        begins: list[Sequence[int] | None] = [None] * len(prompts)
        if decoder_input_ids is not None:
            begins = list(decoder_input_ids)
        if len(begins) != len(prompts):
            raise UserError(
                f"decoder_input_ids has {len(begins)} sequences, but there are {len(prompts)} "
                f"{what}s: give one for each"
            )
        return [
            self.input(self.encode(prompt, chat, chat_template_kwargs), begin, f"{what} {place}")
            for place, (prompt, begin) in enumerate(zip(prompts, begins, strict=True), 1)
        ]

    def track_expert_load(self) -> ExpertLoad:
        """The rows that experts are given from now on, which are counted as they are routed.
        UserError if the model has no experts."""
        self.check_has_experts("counting the load of experts")
        load = ExpertLoad()
        self.decoder = self.decoder.map_moe_layers(load.attach)
        return load

    def record_routing(self) -> None:
        """From now on, remember what the routers choose for each token. UserError if the model has
        no experts."""
        self.check_has_experts("recording the routing")
        self.routing_recorder = RoutingRecorder()
        self.decoder = self.decoder.map_moe_layers(self.routing_recorder.record_layer)

    def write_routing(self, path: str | Path, names: Sequence[str]) -> None:
        """Write what was recorded, of one call of `generate` or `logits` whose requests have these
        names. Collective; OSError if the file cannot be written, on the rank that writes."""
        assert self.routing_recorder is not None, "record_routing comes first"
        decisions = self.routing_recorder.gather_routing(self.mesh, names, self.decoder.dtype)
        if decisions is not None:
            write_routing(Path(path), decisions, self.config)

    def replay_routing(self, path: str | Path, names: Sequence[str]) -> None:
        """From now on, do not ask the routers but a file that `write_routing` wrote: the requests
        of the next call have these names. Collective.

        UserError if the file cannot be read, is of another model, or lacks one of the requests.
        """
        self.check_has_experts("replaying a routing")
        where = f"the routing in {path}"
        world = self.mesh.world
        with raise_on_all(world.comm, world.calls):
            routing_trace = read_routing(Path(path), self.config, where).of(names)
        self.routing_trace = routing_trace
        self.decoder = self.decoder.map_moe_layers(partial(replay_layer, routing_trace))

    def _check_routing(self, encoded: Sequence[Sequence[int]], chosen: int, n: int = 1) -> None:
        """Refuse sequences, of which up to `chosen` more tokens will be fed, whose routing cannot
        be recorded, or which what is to be replayed does not have (UserError)."""
        if self.routing_recorder is None and self.routing_trace is None:
            return
        if n > 1:
            raise UserError(
                f"n {n} makes several answers of one prompt, whose routing is neither recorded nor "
                "replayed: leave it out"
            )
        for place, ids in enumerate(encoded):
            longest = min(len(ids) + chosen, self.config.max_position_embeddings)
            if self.decoder.rope_lengths(longest) != self.decoder.rope_lengths(len(ids)):
                raise UserError(
                    f"the {self.config.rope.kind} rope of {self.path} takes a "
                    f"sequence of {longest} tokens in again as it grows, so that a token is routed "
                    "many times, which is neither recorded nor replayed: use fewer tokens, or "
                    "score them with logits"
                )
            if self.routing_trace is not None:
                request_S = np.full(len(ids), place)
                self.routing_trace.find(request_S, np.arange(len(ids)), np.array(ids, np.int64))

    def check_has_experts(self, what: str) -> None:
        """Refuse `what` is asked of experts where there are none (UserError)."""
        if self.config.moe is None:
            raise UserError(f"{what} has no effect on a model without experts: leave it out")
        if self.config.encoder is not None:
            raise UserError(f"{what} is not built for a model with an encoder: leave it out")

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams = SamplingParams(),  # noqa: B008 (immutable)
        *,
        chat: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        decoder_input_ids: Sequence[Sequence[int]] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        on_finish: Callable[[int], None] | None = None,
        timing: Timing | None = None,
        chunked_prefill_size: int | None = None,
    ) -> list[Completion]:
        """The completions of all `prompts`, in their order, on every rank; of each prompt the
        `params.n` completions one after the other. `prompts` is one text, one sequence of token
        ids, or an iterable of several.

        All are continued as `params` say. With `chat`, a text opens a conversation in the model's
        chat template, which is given `chat_template_kwargs`: ``{"enable_thinking": False}``, or
        ``tools`` and ``documents``. Where an encoder reads the prompts, the decoder goes on from
        the `decoder_input_ids` of each, or from the model's first token. `on_text` is called with
        ``(completion's place, text)`` as text appears and `on_finish` with the places of finished
        completions, both on the ranks of the replica that serves the prompt; `timing` is added to,
        for that replica. Prompts of more than `chunked_prefill_size` tokens enter in several steps,
        but for an encoder, which reads them in one.

        Raises TypeError for what is no prompt; UserError for a prompt that is empty, too long, or
        has ids beyond the vocabulary, where text is asked of a model without a tokenizer, and where
        logits are not finite.
        """
        _check_chunk(chunked_prefill_size)
        _check_params(params)
        given, n = as_prompts(prompts), params.n
        check_token_ids(self.decoder, params)
        encoded = self._inputs(given, decoder_input_ids, "prompt", chat, chat_template_kwargs)
        self._check_routing([one.ids for one in encoded], params.max_tokens - 1, n)
        # Asked of every rank, so that all raise if there is none.
        needs_text = params.stop or on_text or not params.skip_special_tokens
        text = self.text if self.has_tokenizer or needs_text else None
        limits = SchedulerConfig(chunked_prefill_size=chunked_prefill_size)
        prompts_and_ids = list(zip(given, encoded, strict=True))
        return complete(
            self.decoder, text, prompts_and_ids, params, on_text, on_finish, timing, limits
        )

    def default_sampling_params(self, **given: Any) -> SamplingParams:
        """The parameters that are `given`, and for the others the defaults of the model's
        ``generation_config.json``: vLLM's get_default_sampling_params. Raises UserError as
        `read_sampling_defaults` does."""
        return SamplingParams(**{**read_sampling_defaults(self.path), **given})

    def batch(
        self,
        input: str | Path,
        output: str | Path,
        params: SamplingParams = SamplingParams(),  # noqa: B008 (immutable)
        limits: SchedulerConfig | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        chat: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchReport:
        """Answer every line of the file `input` in a line of the file `output`, in their order.

        Lines are those of ``mpishard batch``; `params` are the parameters of lines that have none.
        With `chat`, plain prompts open a conversation in the model's chat template;
        `chat_template_kwargs` are given to the template of every conversation, and a line may have
        others. The replicas, each within `limits`, draw requests as they become free. Answers are
        kept in a journal beside the output, so that a job that was ended goes on where it ended
        when the same call is made again; the output appears when all are there, and the journal
        goes. Both files need to be seen from rank 0 alone. All ranks stop after a step in which
        `should_stop` is true on any of them; `on_progress` is called on rank 0 after answers have
        been written.

        Raises UserError for an input without lines, an output that exists, and a journal that is
        another job's, on all ranks, and on rank 0 alone where the disk takes no more.
        """
        _check_params(params)
        with open_batch(
            self.mesh.world.comm,
            self.path,
            input,
            output,
            params,
            self.decoder.dtype.name,
            self.config.max_position_embeddings,
            self.mesh.world.calls,
            chat,
            chat_template_kwargs,
            self.add_bos,
            self.config.ignored_fields,
        ) as task:
            return self.answer(task, limits, should_stop, on_progress)

    def answer(
        self,
        task: BatchJob | None,
        limits: SchedulerConfig | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> BatchReport:
        """Answer the batch that `open_batch` has opened; `batch` does both."""
        limits = limits or scheduler_config()
        text = self.text if self.has_tokenizer else None
        return run(self.decoder, self.path, text, task, limits, should_stop, on_progress)

    def logits(
        self,
        sequences: Prompt | Iterable[Prompt],
        hidden_states: bool = False,
        chunked_prefill_size: int | None = None,
        decoder_input_ids: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[LogitsOutput | None]:
        """The scores of each sequence in turn, on rank 0 of the mesh; None on the others, which
        must go through the iterator as well. `sequences` is one text, one sequence of token ids, or
        an iterable of several.

        The replicas score as many sequences at a time as there are replicas, so that memory holds
        no more; sequences of more than `chunked_prefill_size` tokens are fed in several steps.
        Where an encoder reads the sequences, the scores are those of the `decoder_input_ids` of
        each, or of the model's first token alone; the hidden states are the decoder's.
        Raises TypeError for what is no sequence, and UserError for one that is empty, too long, or
        has ids beyond the vocabulary.
        """
        given = as_prompts(sequences, "sequence")
        encoded = self._inputs(given, decoder_input_ids, "sequence")
        return self.score(encoded, hidden_states, chunked_prefill_size)

    def score(
        self,
        sequences: list[TokenInput],
        hidden_states: bool = False,
        chunked_prefill_size: int | None = None,
    ) -> Iterator[LogitsOutput | None]:
        """`logits` of sequences that `input` has made and checked."""
        _check_chunk(chunked_prefill_size)
        self._check_routing([one.ids for one in sequences], 0)
        return score_sequences(self.decoder, sequences, hidden_states, chunked_prefill_size)

    def peak_memory(self) -> int:
        """The largest peak of resident memory, in bytes, of any rank."""
        return int(all_reduce(np.array(_peak_memory()), self.mesh.world, MPI.MAX))


def load(
    path: str | Path,
    comm: MPI.Intracomm = MPI.COMM_SELF,
    tp: int | None = None,
    dp: int | None = None,
    compute_dtype: str = "float32",
    *,
    cp: int = 1,
    max_model_len: int | None = None,
    add_bos: bool | None = None,
    ignore_config: Sequence[str] = (),
    watch: Watchdog | None = None,
    **layout_options: bool | float | str | None,
) -> Model:
    """The model of a Hugging Face or shard directory, sharded over the ranks of `comm`.

    `tp` is what the shards were made for, or 1, unless given, and `dp` what `tp` and `cp` leave of
    the communicator. `layout_options` are the other fields of `mpishard.config.layout.Layout`:
    ``sequence_parallel=True``, ``flash_decoding=True``, ``cp_prefill="all-gather"`` … Everything is
    computed in `compute_dtype`, "float32" or "float64". `max_model_len` stands in for the number of
    positions that the configuration allows, whatever the model was trained for. `add_bos` says
    whether a prompt begins with the tokenizer's bos_token, instead of the tokenizer itself.
    `ignore_config` names fields of config.json that would be refused, but do not change the
    mathematics, as the caller knows. `watch` watches over everything that the model does: see
    `mpishard.runtime.watchdog.Watchdog`. The process keeps memory that it frees from then on
    (`mpishard.runtime.malloc`).

    Raises UserError, on all ranks if on one, where the directory cannot be read, where it is not
    the same on all hosts, or where the layout does not fit it: WrongRanks, whose message has the
    command to type, where another number of ranks would do. Raises TypeError for an option that
    does not exist or is of another type.
    """
    check_arguments(layout_options)
    if compute_dtype not in DTYPES:
        raise UserError(f"compute_dtype {compute_dtype!r} must be one of {', '.join(DTYPES)}")
    if max_model_len is not None and not 1 <= max_model_len <= MAX_POSITIONS:
        raise UserError(f"max_model_len {max_model_len} must be 1 to {MAX_POSITIONS}")
    keep_freed_memory()
    calls = watch.calls if watch else CallTracker()
    source = open_on_all(path, comm, ignore_config, calls)
    with raise_on_all(comm, calls):
        try:
            layout = resolve_layout(source, comm.size, tp, dp, cp, layout_options)
        except WrongRanks as error:
            command = f"{launcher()} -n {error.ranks} python …"
            raise error.with_command(command) from None
        config = source.config
        given = [name for name, value in layout_options.items() if value is not None]
        check_experts(config, layout, given)
        if max_model_len is not None:
            config = replace(config, max_position_embeddings=max_model_len)
        placement = read_placement(layout, config)
    mesh = Mesh.split(comm, layout, config, placement, calls)
    with raise_on_all(comm, calls):
        weights = load_weights(
            source, mesh.weight_sharding, mesh.shard_index, DTYPES[compute_dtype]
        )
    decoder = Decoder(config, weights, mesh)
    told = tuple(notices(source))
    return Model(Path(path), config, mesh, decoder, add_bos=add_bos, notices=told)


def _check_chunk(chunked_prefill_size: int | None) -> None:
    if chunked_prefill_size is not None and chunked_prefill_size < 1:
        raise UserError(f"chunked_prefill_size {chunked_prefill_size} must be at least 1")


def _check_params(params: object) -> None:
    if not isinstance(params, SamplingParams):
        raise TypeError(
            f"params are of type {type(params).__name__}: give mpishard.SamplingParams(…)"
        )


def _peak_memory() -> int:
    """The peak of this process's resident memory in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
