"""Mixtures of experts from the command line: the same text from every way to divide the experts,
and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_checkpoint
from tiny_text import write_speaker

from commands.shell import answered, completions, mpishard, refusal, refusal_here

VARIANT = "mixtral-full"  # 6 experts of width 19, 8 query and 4 key/value heads
ASKED = ["--prompt", "the in", "--prompt", "def on(a):\n", "--prompt", "é", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer."""
    return write_speaker(VARIANT, tmp_path_factory.mktemp("moe_model"))


def test_answers_do_not_depend_on_who_has_which_expert(moe_model, tmp_path):
    expected = completions(None, moe_model, *ASKED)
    shards = tmp_path / "shards"
    answered(None, "shard", moe_model, shards, "--tp", 2, "--ep", 4)
    again, context = tmp_path / "again", tmp_path / "context"
    answered(None, "shard", shards, again, "--tp", 1, "--ep", 3)
    answered(None, "shard", again, context, "--tp", 1, "--ep", 2, "--cp", 4)
    answered(None, "inspect", again, "--verify")
    for n, source, how in (
        (2, moe_model, "--tp 2 --ep 2"),
        (2, moe_model, "--tp 2 --moe-token-dispatcher all-gather"),
        (3, moe_model, "--dp 3 --expert-parallel-size 3"),
        (4, moe_model, "--tp 2 --cp 2 --ep 2 --sequence-parallel"),
        (4, moe_model, "--tp 2 --dp 2 --ep 4"),
        (4, shards, "--dp 2"),
        (3, again, ""),
        (4, context, "--cp 4"),
    ):
        assert completions(n, source, *ASKED, *how.split()) == expected, how


def test_experts_stored_together_are_the_same(moe_model, tmp_path):
    together = write_checkpoint(VARIANT, tmp_path / "stacked", stacked=True)
    (together / "tokenizer.json").write_bytes((moe_model / "tokenizer.json").read_bytes())
    expected = completions(None, moe_model, *ASKED)
    assert completions(2, together, *ASKED, "--tp", 1, "--ep", 2, "--dp", 2) == expected


def test_answers_where_experts_take_only_so_much(moe_model):
    """Tokens alone in their step lose nothing, so that only prompts do."""
    alone = ["--prompt", "d", "--max-tokens", "9"]
    limited = ["--expert-capacity-factor", "0.1"]
    expected = completions(None, moe_model, *alone)
    assert completions(2, moe_model, *alone, *limited, "--ep", 2, "--dp", 2) == expected
    whole = completions(None, moe_model, *ASKED)
    assert completions(None, moe_model, *ASKED, *limited) != whole
    assert completions(None, moe_model, *ASKED, "--expert-capacity-factor", 6) == whole


def test_bench_takes_mixtures(moe_model):
    how = "--tp 2 --ep 2 --prompt-tokens 8 --max-tokens 2 --batch 2 --repeat 1".split()
    finished = mpishard(2, "bench", moe_model, *how, "--expert-load")
    assert "all_to_all" in finished.stdout
    assert re.search(r"^ +1  decode +\d+ +0 +[1-6]\.\d\d ", finished.stderr, re.MULTILINE)


def test_the_load_of_experts_is_told_and_written(moe_model, tmp_path):
    lines, file = tmp_path / "in.jsonl", tmp_path / "load.json"
    lines.write_text('{"id": 1, "input_ids": [3, 4, 5]}\n{"id": 2, "input_ids": [6, 7]}\n')
    to = ["--input", lines, "--output", tmp_path / "out.npz"]
    how = ["--tp", 2, "--ep", 2, "--dp", 2]
    finished = mpishard(4, "logits", moe_model, *to, *how, "--expert-load", file)
    assert "expert load, 2 of 6 experts a token, 4 ranks; most over mean:" in finished.stderr
    assert f"    0  prefill     {2 * 5:>9}  {0:>9}  " in finished.stderr
    report = json.loads(file.read_text())
    assert (report["experts"], report["top_k"], report["ranks"]) == (6, 2, 4)
    assert report["layout"] == "--tp 2 --dp 2 --ep 2"
    loads = {(load["layer"], load["phase"]): load for load in report["loads"]}
    assert list(loads) == [(n, phase) for n in (0, 1) for phase in ("prefill", "decode")]
    for (_, phase), load in loads.items():
        rows = 10 if phase == "prefill" else 0
        assert sum(load["rows_of_experts"]) == sum(load["rows_of_ranks"]) == rows
        assert load["dropped"] == 0
        if not rows:
            assert load["imbalance_of_experts"] is load["imbalance_of_ranks"] is None
    # Unlike experts, replicas have what they were dealt.
    assert sum(loads[0, "prefill"]["rows_of_ranks"][:2]) == 6


def test_experts_placed_by_their_load(moe_model, tmp_path):
    """From counting over placing to the same answers, of a checkpoint and of shards, whose other
    files a rank then opens."""
    load, places, shards = tmp_path / "load.json", tmp_path / "places.json", tmp_path / "shards"
    expected = completions(None, moe_model, *ASKED, "--expert-load", load)
    how = ["--ep", 4, "--redundant-experts", 6]
    finished = mpishard(None, "eplb", load, *how, "-o", places)
    assert "3 experts on each of 4 ranks" in finished.stderr
    before, after = re.findall(r": (\S+) before, (\S+) after$", finished.stderr.strip())[0]
    assert float(after) < float(before)
    placed = ["--ep", 4, "--expert-placement", places]
    narrow = tmp_path / "narrow"
    answered(None, "shard", moe_model, shards, "--tp", 2, "--ep", 4)
    answered(None, "shard", shards, narrow, "--tp", 4, "--ep", 4, "--dtype", "bfloat16")
    for source, more in (
        (moe_model, ["--tp", 4]),
        (moe_model, ["--tp", 2, "--cp", 2, "--moe-token-dispatcher", "all-gather"]),
        (shards, ["--dp", 2]),
        (narrow, []),
    ):
        fewer = tmp_path / "fewer.json"
        asked = [*ASKED, *placed, *more, "--expert-load", fewer]
        assert completions(4, source, *asked) == expected, more
        loads = json.loads(fewer.read_text())["loads"]
        assert all(load["imbalance_of_ranks"] < 1.5 for load in loads if load["phase"] == "prefill")


def test_placements_that_do_not_fit(moe_model, model, tmp_path):
    load, places, bad = tmp_path / "load.json", tmp_path / "places.json", tmp_path / "bad.json"
    completions(None, moe_model, *ASKED, "--expert-load", load)
    bad.write_text("{}")
    assert "equally many of: use --redundant-experts 2 or 6" in refusal_here(
        *("eplb", load, "--ep", 4, "--redundant-experts", 3, "-o", places)
    )
    assert refusal_here("eplb", bad, "--ep", 2, "-o", places) == (
        f"{bad} has the \"format\" None, not 'mpishard expert load 1': give the file that "
        "--expert-load wrote"
    )
    spoiled = json.loads(load.read_text())
    spoiled["loads"][0]["rows_of_experts"].pop()
    bad.write_text(json.dumps(spoiled))
    assert f"{bad} is not a load as" in refusal_here("eplb", bad, "--ep", 2, "-o", places)
    for odd in (float("inf"), 10**400, "5", 1.0, True, -1):
        spoiled = json.loads(load.read_text())
        spoiled["loads"][0]["rows_of_experts"][0] = odd
        bad.write_text(json.dumps(spoiled))
        message = refusal_here("eplb", bad, "--ep", 2, "-o", places)
        assert message.endswith(
            "layer and rows must be whole numbers from 0 to 4611686018427387904"
        )
    bad.write_text(json.dumps(spoiled | {"loads": []}))
    assert f"{bad} has no rows" in refusal_here("eplb", bad, "--ep", 2, "-o", places)
    assert "is what is read: give another name" in refusal_here("eplb", load, "--ep", 2, "-o", load)
    answered(None, "eplb", load, "--ep", 3, "-o", places)
    asked = ["generate", moe_model, "--prompt", "a", "--expert-placement", places]
    assert "no effect with --ep 1, where every rank has all experts" in refusal_here(*asked)
    sentence = refusal(2, *asked, "--tp", 2, "--ep", 2)
    assert sentence.startswith(f'--expert-placement {places} has "ep" 3, but --ep is 2: make')
    asked[1] = model
    assert "no effect" in refusal_here(*asked)


@pytest.fixture(scope="module")
def misled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with routers that choose otherwise."""
    path = write_speaker(VARIANT, tmp_path_factory.mktemp("misled"))
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if name.endswith("gate.weight"):
            weights[name] = -weights[name]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_routing_is_recorded_and_replayed(moe_model, misled, tmp_path):
    """By generate on one rank, then by both commands on others and other routers."""
    routing, double = tmp_path / "routing.npz", ["--compute-dtype", "float64"]
    expected = completions(None, moe_model, *ASKED, *double, "--record-routing", routing)
    replay = [*double, "--replay-routing", routing]
    assert completions(None, misled, *ASKED, *double) != expected
    for how in ("--tp 2 --ep 2 --dp 2", "--cp 2 --tp 2 --ep 4 --sequence-parallel"):
        assert completions(4, misled, *ASKED, *replay, *how.split()) == expected, how

    lines, found = tmp_path / "in.jsonl", []
    with np.load(routing) as archive:
        for request, answer in enumerate(expected):
            ids = archive["token"][archive["request"] == request].tolist()
            assert ids[-len(answer["output_ids"]) + 1 :] == answer["output_ids"][:-1]
            found.append({"id": str(request), "input_ids": ids})
    lines.write_text("".join(json.dumps(line) + "\n" for line in found))
    again, scores = tmp_path / "again.npz", []
    for n, source, flags in (
        (3, moe_model, ["--dp", 3, "--record-routing", again, "--chunked-prefill-size", 3]),
        (4, misled, ["--tp", 2, "--dp", 2, "--ep", 4, "--replay-routing", routing]),
    ):
        out = tmp_path / f"{n}.npz"
        answered(n, "logits", source, "--input", lines, "--output", out, *double, *flags)
        with np.load(out) as archive:
            scores.append(dict(archive))
    assert scores[0].keys() == scores[1].keys() == {"0", "1", "2"}
    for name, expected_SV in scores[0].items():
        np.testing.assert_allclose(scores[1][name], expected_SV, rtol=0, atol=1e-6)
    with np.load(routing) as one, np.load(again) as other:
        for name in one:
            if name == "weights":
                np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-9)
            else:
                np.testing.assert_array_equal(one[name], other[name])


def test_routing_of_tokens_that_are_routed_again_is_not_recorded(moe_model, tmp_path):
    """Beyond its trained length a dynamic rope changes what all tokens so far are."""
    dynamic = tmp_path / "dynamic"
    shutil.copytree(moe_model, dynamic)
    config = json.loads((dynamic / "config.json").read_text())
    config |= {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 8}
    (dynamic / "config.json").write_text(json.dumps(config))
    asked = ["generate", dynamic, "--prompt", "d", "--json", "--record-routing", tmp_path / "a.npz"]
    asked += ["--max-model-len", 30]
    answered(None, *asked, "--max-tokens", 3)
    sentence = refusal_here(*asked, "--max-tokens", 25)
    assert sentence.startswith(f"the dynamic rope of {dynamic} takes a sequence of 25 tokens in ag")


def test_routing_that_does_not_fit(moe_model, model, tmp_path):
    routing, other = tmp_path / "routing.npz", tmp_path / "other.npz"
    asked = ["generate", moe_model, "--prompt", "the in", "--max-tokens", 3]
    answered(None, *asked, "--record-routing", routing)
    replay = ["--replay-routing", routing]
    assert "--record-routing" in refusal_here(*asked, *replay, "--record-routing", other)
    assert "there is no directory" in refusal_here(*asked, "--record-routing", tmp_path / "a" / "b")
    assert refusal_here(*asked, "--prompt", "a", *replay) == (
        f"the routing in {routing} has no request '1'; it has '0'"
    )
    asked[3] = "the on"
    assert "is of token" in refusal_here(*asked, *replay)
    asked[3] = "the in"
    more = [*asked[:-1], 9, "--json"]
    sentence = refusal(2, *more, *replay, "--tp", 2, "--ep", 2)
    assert f"the routing in {routing} has nothing for position" in sentence
    assert refusal_here("generate", model, "--prompt", "a", *replay) == (
        "--replay-routing has no effect on a model without experts: leave it out"
    )
    another = write_speaker("olmoe-plain", tmp_path / "another")
    sentence = refusal_here("generate", another, "--prompt", "a", *replay)
    assert sentence == (
        f"the routing in {routing} has the \"model_type\" 'mixtral', but the model's is 'olmoe'"
    )


def test_a_load_that_cannot_be_counted_or_written(moe_model, model, tmp_path):
    asked = ["generate", moe_model, "--prompt", "a", "--expert-load"]
    assert refusal_here(*asked, tmp_path) == (
        f"--expert-load {tmp_path} is a directory: give the name of a file"
    )
    assert "there is no directory" in refusal_here(*asked, tmp_path / "no" / "load.json")
    for command in ("generate {} --prompt a", "bench {}"):
        sentence = refusal_here(*command.format(model).split(), "--expert-load")
        assert sentence == ("--expert-load has no effect on a model without experts: leave it out")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--ep 7", "--ep 7 must be 1 to the model's 6 experts: a rank without an expert"),
        ("--ep 2", "--ep 2 does not divide --tp 1 --dp 1: it must divide the 1 ranks of a replica"),
        (
            "--expert-capacity-factor 0",
            "--expert-capacity-factor 0.0 must be a number above 0: how many times its",
        ),
        ("--expert-capacity-factor inf", "--expert-capacity-factor inf must be a number above 0"),
        (
            "--token-drop-policy position",
            "position has no effect where nothing is dropped: leave it out",
        ),
    ],
)
def test_experts_that_cannot_be_divided_so(moe_model, flags, sentence):
    assert sentence in refusal_here("generate", moe_model, "--prompt", "a", *flags.split())


def test_ranks_that_do_not_fit_the_experts(moe_model):
    sentence = refusal(4, "generate", moe_model, "--prompt", "a", "--tp", 4, "--ep", 3)
    assert sentence.endswith("use --ep 1 or 2 or 4")


def test_switches_of_experts_have_no_effect_on_a_dense_model(model):
    for flags in ("--ep 1", "--moe-token-dispatcher all-gather", "--expert-capacity-factor 1.5"):
        sentence = refusal_here("generate", model, "--prompt", "a", *flags.split())
        assert sentence == f"{flags} has no effect on a model without experts: leave it out"


@pytest.mark.parametrize("variant", ["gpt_oss-yarn", "deepseek_v2-lite", "deepseek_v3-groups"])
def test_sinks_and_latents_on_any_ranks(variant, tmp_path):
    """Caches divided over the ranks, too, which merge what the sinks take their part of."""
    speaker, shards = write_speaker(variant, tmp_path / "model"), tmp_path / "shards"
    expected = completions(None, speaker, *ASKED)
    answered(2, "shard", speaker, shards, "--tp", 4, "--ep", 2)
    answered(None, "inspect", shards, "--verify")
    for n, source, how in (
        (2, speaker, "--cp 2 --ep 2 --chunked-prefill-size 3"),
        (3, speaker, "--tp 3 --sequence-parallel"),
        (4, shards, "--flash-decoding" if "deepseek" in variant else ""),
        (4, speaker, "--tp 2 --cp 2 --ep 4 --cp-prefill all-gather --decode-merge all-reduce"),
    ):
        assert completions(n, source, *ASKED, *how.split()) == expected, how
