"""The Python interface, under communicators of every size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from mpi4py import MPI
from sweep import accepted, layouts
from tiny_models import VARIANTS, tiny_config, write_checkpoint
from tiny_text import write_speaker
from toys import oracle

import mpishard
from mpishard.config.layout import LAYOUT_OPTIONS, Layout
from mpishard.engine.generate import Timing
from mpishard.engine.sampling_params import SamplingParams
from mpishard.runtime.agreement import raise_on_all

pytestmark = pytest.mark.ranks

VARIANT = "llama-gqa"
IDS = [[1, 5, 66, 0, 9, 3], [2], [3, 3, 3], [40, 41, 7, 9], [66, 11]]
PROMPTS = ["the in", "def on(a):\n", "é"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model for every rank, each in a directory of its own."""
    return write_speaker(VARIANT, tmp_path_factory.mktemp("model"))


def each_layout(
    path: Path, comm: MPI.Intracomm, every: int = 1, **options: Any
) -> Iterator[mpishard.Model]:
    """The model in each of the layouts that the ranks can have, or in every so-manieth."""
    for layout in layouts(comm.size, VARIANT)[::every]:
        model = load_as(accepted(layout, tiny_config(VARIANT)), path, comm, **options)
        yield model
        model.mesh.free()


def load_as(layout: Layout, path: Path, comm: MPI.Intracomm, **options: Any) -> mpishard.Model:
    return mpishard.load(
        path, comm, layout.tp, layout.dp, cp=layout.cp, **layout_options(layout), **options
    )


def layout_options(layout: Layout) -> dict[str, Any]:
    """What is to be said of `layout` beside its degrees."""
    values = {name: getattr(layout, name) for name in LAYOUT_OPTIONS}
    return {name: value for name, value in values.items() if value != LAYOUT_OPTIONS[name].default}


def same_everywhere(value: object, comm: MPI.Intracomm) -> bool:
    return all(other == value for other in comm.allgather(value))


# Generating


def test_every_layout_gives_every_rank_the_same_answers(path, comm):
    alone = mpishard.load(path).generate([*PROMPTS, *IDS], SamplingParams(max_tokens=6))
    assert [answer.prompt for answer in alone] == [*PROMPTS, *IDS]
    assert [answer.prompt_tokens for answer in alone[3:]] == list(map(len, IDS))
    for model in each_layout(path, comm):
        answers = model.generate([*PROMPTS, *IDS], SamplingParams(max_tokens=6))
        assert answers == alone
        assert same_everywhere(answers, comm)


def test_greedy_tokens_are_the_oracles(path, comm):
    for model in each_layout(path, comm, compute_dtype="float64"):
        answers = model.generate(IDS, SamplingParams(max_tokens=5, ignore_eos=True))
        assert [a.output_ids for a in answers] == [oracle(VARIANT).greedy(ids, 5) for ids in IDS]


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_prompts_taken_in_by_pieces_are_answered_the_same(path, comm, chunk):
    """Two are longer than a chunk of 4, one ends with one, and 1000 is more than there is."""
    prompts = [*IDS, list(range(3, 14))]
    right = [oracle(VARIANT).greedy(ids, 4) for ids in prompts]
    for model in each_layout(path, comm, every=2, compute_dtype="float64"):
        timing = Timing()
        answers = model.generate(
            prompts,
            SamplingParams(max_tokens=4, ignore_eos=True),
            chunked_prefill_size=chunk,
            timing=timing,
        )
        assert [answer.output_ids for answer in answers] == right
        mine = prompts[model.mesh.dp.rank :: model.mesh.dp.size]
        assert timing.prefill_tokens >= sum(map(len, mine))


@pytest.mark.ranks(1, 2, 3)
def test_a_model_can_be_given_more_positions_or_fewer(path, comm):
    long = [(7 * place) % 67 for place in range(80)]
    longer = mpishard.load(path, comm, cp=comm.size, compute_dtype="float64", max_model_len=100)
    (answer,) = longer.generate([long], SamplingParams(max_tokens=30, ignore_eos=True))
    assert answer.output_ids == oracle(VARIANT).greedy(long, 21), "the last token has no position"
    assert answer.finish_reason == "length"
    (score,) = longer.logits([long])
    if score is not None:
        right_SV, _ = oracle(VARIANT).forward(long)
        np.testing.assert_allclose(score.logits, right_SV, rtol=0, atol=1e-9)
    shorter = mpishard.load(path, comm, max_model_len=8)
    with pytest.raises(mpishard.UserError, match="prompt 1 has 9 tokens, .* only 8 positions"):
        shorter.generate([[1] * 9])


def test_text_and_ends_are_told_to_the_replica_that_makes_them(path, comm):
    for model in each_layout(path, comm, every=3):
        on_text, ends = Mock(), list[int]()
        answers = model.generate(
            PROMPTS,
            mpishard.SamplingParams(temperature=1, seed=3, max_tokens=8, stop=("x",)),
            on_text=on_text,
            on_finish=ends.append,
        )
        mine = set(range(len(PROMPTS))[model.mesh.dp.rank :: model.mesh.dp.size])
        assert set(ends) == mine and len(ends) == len(mine)
        told = dict.fromkeys(mine, "")
        for place, piece in (call.args for call in on_text.call_args_list):
            told[place] += piece
        assert told == {place: answers[place].text for place in mine}


def test_the_time_is_that_of_the_replica(path, comm):
    for model in each_layout(path, comm, every=3):
        timing, started = Timing(), perf_counter()
        answers = model.generate(IDS, SamplingParams(max_tokens=4, ignore_eos=True), timing=timing)
        assert timing.prefill_seconds + timing.decode_seconds <= perf_counter() - started
        mine = answers[model.mesh.dp.rank :: model.mesh.dp.size]
        assert timing.prefill_tokens == sum(answer.prompt_tokens for answer in mine)
        assert timing.decode_tokens == sum(answer.completion_tokens - 1 for answer in mine)


@pytest.mark.ranks(1, 3)
def test_nothing_to_do(path, comm):
    model = mpishard.load(path, comm)
    assert model.generate([]) == []
    assert list(model.logits([])) == []


@pytest.mark.ranks(1, 2)
def test_a_model_without_a_tokenizer_takes_and_gives_ids(tmp_path, comm):
    model = mpishard.load(write_checkpoint("llama-mqa", tmp_path / "bare"), comm)
    assert not model.has_tokenizer
    (answer,) = model.generate([np.array([1, 2, 3])], SamplingParams(max_tokens=3, ignore_eos=True))
    assert answer.prompt == [1, 2, 3] and answer.text is None
    assert answer.completion_tokens == len(answer.output_ids) == 3
    with pytest.raises(mpishard.UserError, match="tokenizer.json does not exist"):
        model.generate([[1, 2, 3]], SamplingParams(stop=("x",)))
    with pytest.raises(mpishard.UserError, match="tokenizer.json does not exist"):
        model.generate([[1, 2, 3]], on_text=print)


# Scoring


@pytest.mark.parametrize("hidden_states, chunk", [(False, None), (True, None), (True, 3)])
def test_scores_are_the_oracles_on_the_first_rank(path, comm, hidden_states, chunk):
    """Also where the sequences do not divide evenly over the replicas, and in chunks."""
    right = [oracle(VARIANT).forward(ids) for ids in IDS]
    for model in each_layout(path, comm, compute_dtype="float64"):
        scores = [*model.logits(IDS, hidden_states, chunk), *model.logits(IDS[:1], hidden_states)]
        assert len(scores) == len(IDS) + 1
        if comm.rank:
            assert scores == [None] * (len(IDS) + 1)
            continue
        for score, (logits_SV, hidden) in zip(scores, [*right, right[0]], strict=True):
            assert score is not None
            np.testing.assert_allclose(score.logits, logits_SV, rtol=0, atol=1e-9)
            assert len(score.hidden_states) == (len(hidden) if hidden_states else 0)
            for x_SD, right_SD in zip(score.hidden_states, hidden, strict=False):
                np.testing.assert_allclose(x_SD, right_SD, rtol=0, atol=1e-9)


@pytest.mark.ranks(2)
def test_text_can_be_scored(path, comm):
    model = mpishard.load(path, comm, tp=2)
    (of_text,), (of_ids,) = model.logits(["the"]), model.logits([model.text.encode("the")])
    if comm.rank == 0:
        assert np.array_equal(of_text.logits, of_ids.logits)


# Communicators


@pytest.mark.ranks(2, 3, 8)
def test_a_part_of_the_ranks_can_have_a_model_of_its_own(path, comm):
    half = comm.Split(comm.rank % 2)
    model = mpishard.load(path, half, tp=half.size)
    prompts = PROMPTS[: 1 + comm.rank % 2]  # the other half has other work
    answers = model.generate(prompts, SamplingParams(max_tokens=5))
    assert answers == mpishard.load(path).generate(prompts, SamplingParams(max_tokens=5))
    half.Free()


@pytest.mark.ranks(2, 4)
def test_the_layout_follows_from_what_is_left_open(path, comm):
    assert (mpishard.load(path, comm).mesh.layout.tp, comm.size) == (1, comm.size)
    assert mpishard.load(path, comm).mesh.layout.dp == comm.size
    assert mpishard.load(path, comm, tp=2).mesh.layout.dp == comm.size // 2
    assert mpishard.load(path, comm, cp=2).mesh.layout == Layout(cp=2, dp=comm.size // 2)
    with pytest.raises(mpishard.UserError, match="run `mpirun -n 3 python …`"):
        mpishard.load(path, comm, tp=3, dp=1)


# Failing


@pytest.mark.ranks(2, 3, 8)
def test_what_fails_on_one_rank_fails_on_all(path, comm):
    mine = path if comm.rank != 1 else path / "none"
    with pytest.raises(mpishard.UserError, match="none does not exist"):
        mpishard.load(mine, comm)


@pytest.mark.ranks(1, 4)
def test_of_several_failures_the_lowest_ranks_is_raised(comm):
    with pytest.raises(mpishard.UserError, match=f"rank {comm.size // 2}"), raise_on_all(comm):
        if comm.rank >= comm.size // 2:
            raise mpishard.UserError(f"rank {comm.rank}")
    with raise_on_all(comm):
        pass


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (lambda model: model.generate(["a", ""]), "prompt 2 is empty"),
        (lambda model: model.generate([[1, 67]]), "prompt 1 has token id 67"),
        (lambda model: model.generate([[1] * 65]), "prompt 1 has 65 tokens"),
        (
            lambda model: model.generate(["a"], SamplingParams(max_tokens=0)),
            "max_tokens 0 is out of range",
        ),
        (
            lambda model: model.generate(["a"], chunked_prefill_size=0),
            "chunked_prefill_size 0 must be at least",
        ),
        (lambda model: model.generate(["a"], SamplingParams(stop=("b", ""))), "none of them empty"),
        (
            lambda model: model.generate(["a"], SamplingParams(stop="b")),  # type: ignore[arg-type]
            "stop 'b' must be a list",
        ),
        (lambda model: model.generate([[1]], chat=True), "not token ids"),
        (lambda model: model.logits([[1], []]), "sequence 2 is empty"),
        (lambda model: model.logits([[-1]]), "sequence 1 has token id -1"),
    ],
)
def test_a_wrong_call_is_refused_and_the_next_one_works(
    path, comm, wrong: Callable[[mpishard.Model], object], sentence: str
):
    model = mpishard.load(path, comm)
    with pytest.raises(mpishard.UserError, match=sentence):
        wrong(model)
    assert len(model.generate(["a"], SamplingParams(max_tokens=1))) == 1


@pytest.mark.ranks(1)
def test_ids_are_integers(path, comm):
    with pytest.raises(TypeError):
        mpishard.load(path, comm).generate([[1.0, 2.0]])


@pytest.mark.ranks(1)
def test_the_compute_dtype_is_one_of_two(path, comm):
    with pytest.raises(mpishard.UserError, match="'float16' must be one of float32, float64"):
        mpishard.load(path, comm, compute_dtype="float16")


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"cp": 0}, "--cp 0 must be at least 1"),
        ({"tp": 1, "dp": 0}, "--dp 0 must be at least 1"),
        ({"cp": 2, "cp_prefill": "rong"}, "--cp-prefill rong must be one of ring, all-gather"),
        ({"cp": 2, "cp_order": "zag"}, "--cp-order zag must be one of zigzag, contiguous"),
        ({"cp": 2, "decode_merge": "sum"}, "--decode-merge sum must be one of"),
        (
            {"cp": 2, "cp_kv_cache_interleave_size": 0},
            "--cp-kv-cache-interleave-size 0 must be 1 to 2147483647",
        ),
        ({"tp": 2, "cp_prefill": "ring"}, "--cp-prefill ring has no effect with --cp 1"),
        ({"tp": 2, "decode_merge": "all-reduce"}, "--decode-merge all-reduce has no effect where"),
        ({"cp": 3}, "--tp 1 --cp 3 makes replicas of 3 ranks, .* run `mpirun -n 3 python …`"),
        ({"tp": 2, "cp": 2, "dp": 1}, "needs 4 ranks but 2 were started: run `mpirun -n 4 python"),
        ({"max_model_len": 0}, "max_model_len 0 must be 1 to 2147483647"),
        ({"max_model_len": 2**31}, "max_model_len 2147483648 must be 1 to 2147483647"),
    ],
)
def test_a_wrong_layout_is_refused(path, comm, wrong: dict[str, Any], sentence: str):
    with pytest.raises(mpishard.UserError, match=sentence):
        mpishard.load(path, comm, **wrong)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("value", [1, None])
def test_an_argument_that_does_not_exist_is_named(path, comm, value):
    with pytest.raises(TypeError, match=r"load\(\) has no argument 'nonsense'; options are seq"):
        mpishard.load(path, comm, sequence_parallel=True, nonsense=value)


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    "wrong",
    [
        {"sequence_parallel": "no"},
        {"flash_decoding": 1},
        {"cp": 2, "cp_kv_cache_interleave_size": "2"},
    ],
)
def test_an_argument_of_another_type_is_refused(path, comm, wrong):
    with pytest.raises(TypeError, match=" must be of type (bool|int)"):
        mpishard.load(path, comm, **wrong)


@pytest.mark.ranks(1, 2)
def test_flash_decoding_needs_heads_that_can_be_shared(tmp_path, comm):
    bare = write_checkpoint("llama-mha", tmp_path / "bare")
    with pytest.raises(mpishard.UserError, match="8 query heads and 8 key/value heads"):
        mpishard.load(bare, comm, flash_decoding=True)


@pytest.mark.ranks(2)
def test_memory_is_that_of_the_fullest_rank(path, comm):
    model = mpishard.load(path, comm)
    ballast = np.ones(comm.rank * 2**24)
    peak = model.peak_memory()
    assert same_everywhere(peak, comm) and peak > ballast.nbytes
    assert VARIANTS[VARIANT]["vocab_size"] == model.config.vocab
