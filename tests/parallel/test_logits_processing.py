"""Bias, penalties, log-probabilities and several answers on every layout, beside a plain
implementation on whole logits, transformers' penalty, and the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from test_api import each_layout, same_everywhere
from test_sampling import VOCAB, logits, shards
from tiny_text import write_speaker
from toys import oracle

import mpishard
from mpishard.config.layout import block
from mpishard.engine.logits_processor import LogitsProcessor
from mpishard.engine.logprobs import sampled_logprobs
from mpishard.engine.sampling import NO_TOKEN, SamplingRow, sample
from mpishard.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "repetition_penalty.npz"
VARIANT = "llama-gqa"
PROMPT, ANSWER = [3, 299, 3, 17, 0], [17, 17, 150, 300, 17]
ALL = SamplingParams(
    repetition_penalty=1.7,
    presence_penalty=0.6,
    frequency_penalty=-0.4,
    logit_bias={0: 2.5, 17: -1, 150: 0.25, 299: -100},
)
WISHES = [
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.5),
    SamplingParams(presence_penalty=2),
    SamplingParams(frequency_penalty=0.3),
    SamplingParams(logit_bias={VOCAB - 1: 100, 5: -3.5}),
    ALL,
]


def plain_process(
    logits_V: np.ndarray, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> np.ndarray:
    """Whole logits, one token after the other, in Python's loops: vLLM's definitions."""
    number, result = logits_V.dtype.type, list(logits_V)
    for token, bias in params.bias_pairs:
        result[token] += number(bias)
    for token in {*prompt, *answer}:
        penalty = number(params.repetition_penalty)
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token, count in Counter(answer).items():
        result[token] -= number(params.frequency_penalty) * number(count)
        result[token] -= number(params.presence_penalty)
    return np.array(result, logits_V.dtype)


# On shards of the vocabulary


@pytest.mark.parametrize("params", WISHES, ids=range(len(WISHES)))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_rank_changes_its_tokens_to_the_bit(comm: MPI.Intracomm, params, dtype):
    """Also when the answer comes token by token."""
    logits_MV = logits(3.0).astype(dtype)
    expected = plain_process(logits_MV[0], params, PROMPT, ANSWER)
    for mesh, logits_Mv in shards(comm, logits_MV):
        mine = block(VOCAB, mesh.tp.size, mesh.tp.rank)
        process = LogitsProcessor(params, PROMPT, mine)
        for length in range(len(ANSWER) + 1):
            processed_v = process(logits_Mv[0], ANSWER[:length])
        np.testing.assert_array_equal(processed_v, expected[mine])
        assert processed_v.dtype == dtype


def test_the_repetition_penalty_is_that_of_transformers(comm: MPI.Intracomm):
    golden = np.load(GOLDEN)
    for row, penalty in enumerate(golden["penalty"].tolist()):
        for mesh, logits_Mv in shards(comm, golden["logits"]):
            mine = block(VOCAB, mesh.tp.size, mesh.tp.rank)
            ids = golden["ids"].tolist()
            process = LogitsProcessor(SamplingParams(repetition_penalty=penalty), ids[:9], mine)
            found_v = process(logits_Mv[0], ids[9:])
            np.testing.assert_array_equal(found_v, golden["processed"][row, mine])


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_tokens_are_chosen_from_changed_logits(comm: MPI.Intracomm, how):
    """In a step with rows that change nothing; logits themselves stay as they are."""
    logits_MV = logits(2.0)
    params = [replace(ALL, **how), SamplingParams(**how)]
    whole = np.stack([plain_process(logits_MV[0], ALL, PROMPT, ANSWER), logits_MV[1]])
    for mesh, logits_Mv in shards(comm, logits_MV[:2]):
        before = logits_Mv.copy()
        process = LogitsProcessor(ALL, PROMPT, block(VOCAB, mesh.tp.size, mesh.tp.rank))
        rows = [
            SamplingRow(params[0], 4, 9, process=partial(process, answer=ANSWER)),
            SamplingRow(params[1], 5, 9),
        ]
        plain_rows = [replace(row, process=None) for row in rows]
        mine = block(VOCAB, mesh.tp.size, mesh.tp.rank)
        right = sample(np.ascontiguousarray(whole[:, mine]), plain_rows, VOCAB, mesh)
        assert sample(logits_Mv, rows, VOCAB, mesh) == right
        np.testing.assert_array_equal(logits_Mv, before)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_log_probabilities_are_those_of_the_whole_softmax(comm: MPI.Intracomm, count):
    """And cost one all_gather of candidates and one all_reduce of two numbers a row."""
    logits_MV = logits(4.0)
    tokens_M = np.array([0, 5, 100, 200, VOCAB - 1, 77])
    logprob_MV = logits_MV - np.logaddexp.reduce(logits_MV, axis=1, keepdims=True)
    order = np.argsort(-logits_MV, axis=1, kind="stable")[:, :count]
    right = [
        tokens_M[:, None],
        logprob_MV[np.arange(6), tokens_M][:, None],
        order,
        np.take_along_axis(logprob_MV, order, 1),
    ]
    for mesh, logits_Mv in shards(comm, logits_MV):
        mesh.ledger.clear()
        found = sampled_logprobs(logits_Mv, tokens_M, count, VOCAB, mesh)
        np.testing.assert_allclose(found, np.concatenate(right, axis=1), rtol=0, atol=1e-12)
        calls = {(what, group): (e.calls, e.payload_bytes) for what, group, e in mesh.ledger}
        candidates = 6 * max(count, 1) * 16
        assert calls == {
            ("all_gather", "tp"): (1, candidates),
            ("all_reduce", "tp"): (1, 6 * 2 * 8),
        }


def test_a_vocabulary_smaller_than_what_is_asked_for(comm: MPI.Intracomm):
    """Some ranks hold no token at all."""
    for mesh, logits_Mv in shards(comm, np.log([[0.25, 0.5, 0.25]])):
        (found,) = sampled_logprobs(logits_Mv, np.array([2]), 5, 3, mesh)
        assert found[[0, *range(2, 7)]].tolist() == [2, 1, 0, 2, NO_TOKEN, NO_TOKEN]
        np.testing.assert_allclose(found[[1, 7, 8, 9]], np.log([0.25, 0.5, 0.25, 0.25]))


# On every layout


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaker(VARIANT, tmp_path_factory.mktemp("model"))


PROMPTS = [[1, 5, 66, 0, 9, 3], [2], [40, 41, 7, 9], [66, 11]]
CHANGED = SamplingParams(
    max_tokens=7,
    ignore_eos=True,
    repetition_penalty=1.4,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    logit_bias={5: 1.5, 66: -100},
    logprobs=2,
)


@cache
def plain_answer(prompt: tuple[int, ...]) -> tuple[list[int], list[np.ndarray]]:
    """A greedy answer as the reference gives it, recomputed for every token from whole logits; and
    the log-probabilities of the vocabulary for each."""
    answer: list[int] = []
    logprobs = []
    for _ in range(CHANGED.max_tokens):
        logits_V = oracle(VARIANT).forward([*prompt, *answer])[0][-1]
        logprobs.append(logits_V - np.logaddexp.reduce(logits_V))
        answer.append(int(plain_process(logits_V, CHANGED, prompt, answer).argmax()))
    return answer, logprobs


def test_every_layout_answers_as_the_reference_with_plain_penalties(path, comm):
    for model in each_layout(path, comm, every=2, compute_dtype="float64"):
        completions = model.generate(PROMPTS, CHANGED, chunked_prefill_size=3)
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            answer, logprobs = plain_answer(tuple(prompt))
            assert completion.output_ids == answer
            assert completion.logprobs is not None
            for token, by_id, whole_V in zip(answer, completion.logprobs, logprobs, strict=True):
                top = np.argsort(-whole_V, kind="stable")[:2].tolist()
                assert list(by_id) == list(dict.fromkeys([*top, token]))
                np.testing.assert_allclose(
                    list(by_id.values()), whole_V[list(by_id)], rtol=0, atol=1e-9
                )


def test_several_answers_differ_and_are_the_same_on_every_layout(path, comm):
    """The first is that of a request for one. A long prompt is shared, not computed again."""
    prompts = ["the in", [7] * 40]
    params = SamplingParams(max_tokens=6, temperature=1.5, seed=3, n=3, logprobs=0)
    alone = mpishard.load(path, compute_dtype="float64").generate(prompts, params)
    assert [(one.prompt, one.index) for one in alone] == [
        (prompt, index) for prompt in prompts for index in range(3)
    ]
    single = mpishard.load(path, compute_dtype="float64").generate(prompts, replace(params, n=1))
    assert [one.output_ids for one in single] == [one.output_ids for one in alone[::3]]
    assert len({tuple(one.output_ids) for one in alone}) == 6
    for model in each_layout(path, comm, every=3, compute_dtype="float64"):
        places: list[int] = []
        pieces: list[tuple[int, str]] = []
        answers = model.generate(
            prompts,
            params,
            on_finish=places.append,
            on_text=lambda place, piece, pieces=pieces: pieces.append((place, piece)),
        )
        assert [one.output_ids for one in answers] == [one.output_ids for one in alone]
        assert same_everywhere([one.output_ids for one in answers], comm)
        mine = [
            place for place in range(6) if place // 3 % model.mesh.dp.size == model.mesh.dp.rank
        ]
        assert sorted(places) == mine
        for place in mine:
            said = "".join(piece for at, piece in pieces if at == place)
            assert said == answers[place].text


def test_what_is_not_asked_for_sends_nothing(path, comm):
    """Penalties never; log-probabilities only in steps with a sequence that wants them."""
    model = mpishard.load(path, comm, tp=comm.size)

    def calls(params: SamplingParams) -> dict[tuple[str, str], int]:
        model.mesh.ledger.clear()
        model.generate([PROMPTS[0]], params)
        return {(what, group): entry.calls for what, group, entry in model.mesh.ledger}

    plain = SamplingParams(max_tokens=4, ignore_eos=True)
    bare = calls(plain)
    assert calls(replace(CHANGED, max_tokens=4, logprobs=None)) == bare
    asked = calls(replace(plain, logprobs=3))
    more = {key: asked[key] - bare.get(key, 0) for key in asked}
    assert {key: count for key, count in more.items() if count} == {
        ("all_gather", "tp"): 4,
        ("all_reduce", "tp"): 4,
        ("all_gather", "cp"): 4,
    }


# What a call may be given


@pytest.mark.ranks(1)
def test_what_is_a_prompt(path):
    model, params = mpishard.load(path), SamplingParams(max_tokens=2)
    text, ids = model.generate(["the in"], params), model.generate([[3, 4]], params)
    assert model.generate("the in", params) == text
    for one in ([3, 4], (3, 4), np.array([3, 4]), range(3, 5), [np.int64(3), 4]):
        assert model.generate(one, params) == ids
        assert model.generate([one], params) == ids
    assert model.generate(iter(["the in"]), params) == text
    assert model.generate((one for one in ["the in", [3, 4]]), params) == text + ids
    assert model.generate(np.array([[3, 4], [3, 4]]), params) == ids + ids
    assert model.generate(np.array([[3], [3]]), params) == model.generate([[3], [3]], params)
    assert model.generate([], params) == []
    with pytest.raises(TypeError, match="params are of type dict: give mpishard.SamplingParams"):
        model.generate("a", {"max_tokens": 2})  # type: ignore[arg-type]
    (scores,) = model.logits("the in")
    (same,) = model.logits([model.encode("the in")])
    assert scores is not None and same is not None
    np.testing.assert_array_equal(scores.logits, same.logits)
    assert len(list(model.logits(model.encode("the in")))) == 1


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    "prompts, sentence",
    [
        (
            b"text",
            "the prompts are b'text', of type bytes: give a text, a sequence of token ids, or",
        ),
        (5, "the prompts are 5, of type int: give"),
        (None, "the prompts are None, of type NoneType: give"),
        ({"prompt": "a"}, "the prompts are {'prompt': 'a'}, of type dict: give"),
        ({"a", "b"}, "of type set: give"),
        (np.array(5), "of type ndarray: give"),
        ([1, "a"], "prompt 1 is 1, of type int: give"),
        (["a", None], "prompt 2 is None, of type NoneType: give"),
        ([1.0, 2.0], "prompt 1 is 1.0, of type float: give"),
        ([True, False], "prompt 1 is True, of type bool: give"),
        ([[1, 2.0]], "token 2 of prompt 1 is 2.0, of type float: token ids are integers"),
        ([["a", "b"]], "token 1 of prompt 1 is 'a', of type str: token ids are integers"),
        ([{"role": "user", "content": "a"}], "prompt 1 is {'role': 'user', 'content': 'a'}, of"),
    ],
)
def test_what_is_no_prompt(path, prompts, sentence):
    model = mpishard.load(path)
    with pytest.raises(TypeError) as refused:
        model.generate(prompts)
    assert sentence in str(refused.value)
    with pytest.raises(TypeError) as refused:
        model.logits(prompts)
    said = str(refused.value).replace("'prompt'", "'sequence'")
    assert sentence.replace("prompt", "sequence") in said
