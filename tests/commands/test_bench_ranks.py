"""What ``mpishard bench`` reports of several ranks, held to independent arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_config, write_checkpoint

from commands.shell import answered
from mpishard.bench import roofline
from mpishard.config.weight_sharding import WeightSharding

PROMPT, TOKENS = 7, 3
UNTIED, TIED, SHARED = "llama-mha", "llama-gqa", "llama-mqa"
FLOAT32 = 4


def run_bench(ranks: int, directory: Path, *options: object) -> dict:
    """The report of ``mpishard bench --json`` on `ranks` ranks."""
    words = [*options, "--max-tokens", TOKENS, "--repeat", 1, "--json"]
    return json.loads(answered(ranks, "bench", directory, *words))


def test_ranks_report_as_one(tmp_path):
    """Two replicas of two ranks: both replicas' tokens count, and a rank is a part of the model."""
    directory = write_checkpoint(UNTIED, tmp_path / UNTIED)
    report = run_bench(4, directory, "--tp", 2, "--prompt-tokens", PROMPT, "--batch", 2)
    assert (report["layout"], report["ranks"]) == ("--tp 2 --dp 2", 4)
    prompt, generation = report["speeds"]
    assert prompt["tokens_per_second"] * prompt["seconds_per_step"] == pytest.approx(4 * PROMPT)
    assert generation["tokens_per_second"] * generation["seconds_per_step"] == pytest.approx(4)
    config = tiny_config(UNTIED)
    assert report["weight_bytes"] == roofline.weight_bytes(config, WeightSharding(2), 0, FLOAT32)
    assert (
        roofline.weight_bytes(config, WeightSharding(1), 0, FLOAT32) // 2 < report["weight_bytes"]
    )
    payload = (2 * config.layers + 1) * 2 * config.hidden * FLOAT32
    reduced = generation["collectives"][0]
    assert (reduced["operation"], reduced["group"]) == ("all_reduce", "tp")
    assert reduced["payload_bytes"] == reduced["wire_bytes"] == payload


@pytest.mark.parametrize(
    ("variant", "options", "stream", "cache"),
    [
        (TIED, ["--tp", 2, "--sequence-parallel"], 2, 2),
        (TIED, ["--cp", 2], 2, 2),
        (TIED, ["--cp", 2, "--cp-prefill", "all-gather"], 2, 2),
        (SHARED, ["--tp", 2, "--flash-decoding"], 1, 2),
    ],
)
def test_layouts_divide_the_residual_stream_and_the_cache(
    tmp_path, variant, options, stream, cache
):
    directory, lengths = write_checkpoint(variant, tmp_path / variant), [9, 21]
    report = run_bench(2, directory, *options, "--prompt-tokens", *lengths, "--batch", 1)
    config = tiny_config(variant)
    assert [row["prompt_tokens"] for row in report["memory"]] == lengths
    per_position = 2 * config.layers * config.kv_heads * config.head_dim * FLOAT32
    for row in report["memory"]:
        length = row["prompt_tokens"]  # odd, so that the fuller rank has one token more
        tokens = -(-length // stream)
        assert row["residual_stream_bytes"] == tokens * config.hidden * FLOAT32
        assert row["kv_cache_bytes"] == (length + TOKENS) // cache * per_position
    exchanged = [
        e for row in report["speeds"] for e in row["collectives"] if e["operation"] == "isendrecv"
    ]
    assert bool(exchanged) == (options == ["--cp", 2])
    for row in report["speeds"]:
        if row["phase"] == "prefill":
            assert row["most_arithmetic_seconds"] >= row["least_arithmetic_seconds"] > 0
            assert bool(row["isendrecv_seconds"]) == (options == ["--cp", 2])
