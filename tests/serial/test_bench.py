"""What `mpishard bench` reports: everything but the seconds, held to independent arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mpi_runner import run_mpi
from tiny_models import tiny_config, tiny_weights, write_checkpoint

import mpishard
from mpishard import bench
from mpishard.arithmetic.packed import pack
from mpishard.cli import make_parser
from mpishard.parallel import tensor

PROMPT, TOKENS, BATCHES = 7, 3, [1, 4]
UNTIED, TIED, WINDOWED = "llama-mha", "llama-gqa", "qwen3-mixed"
FLOAT32 = 4


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(bench, "NODE_WORKING_SET", 2**20)
    monkeypatch.setattr(bench, "RANK_WORKING_SET", 2**20)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> mpishard.Model:
    return load(UNTIED, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def report(model) -> dict:
    return bench.measure(model, PROMPT, TOKENS, BATCHES, repeat=2)


def load(variant: str, directory: Path) -> mpishard.Model:
    return mpishard.load(write_checkpoint(variant, directory / variant))


def test_a_report_has_every_phase_of_every_batch_in_order(report):
    expected = [(phase, batch) for batch in BATCHES for phase in ("prompt", "generation")]
    assert [(row["phase"], row["batch"]) for row in report["speeds"]] == expected


def test_a_report_says_what_was_measured_and_where(report, model):
    said = {name: report[name] for name in ("model", "layout", "ranks", "dtype", "numpy")}
    assert said == {
        "model": str(model.path),
        "layout": "--tp 1 --dp 1",
        "ranks": 1,
        "dtype": "float32",
        "numpy": np.__version__,
    }
    assert (report["prompt_tokens"], report["max_tokens"], report["repeat"]) == (PROMPT, TOKENS, 2)
    assert report["threads"] >= 1
    assert "blas" in report["blas"].lower() or "mkl" in report["blas"].lower()


def test_a_report_is_json(report):
    assert json.loads(json.dumps(report)) == report


def test_speeds_and_limits_agree_with_each_other(report):
    for row in report["speeds"]:
        tokens = row["batch"] * (PROMPT if row["phase"] == "prompt" else 1)
        speed, limit = row["tokens_per_second"], row["limit_tokens_per_second"]
        assert speed * row["seconds_per_step"] == pytest.approx(tokens)
        assert row["share_of_limit"] == pytest.approx(speed / limit)
        reading = report["read_bytes"] / row["bandwidth_bytes_per_second"]
        multiplying = row["product_flops"] / row["product_flops_per_second"]
        assert tokens / limit == pytest.approx(max(reading, multiplying))
        assert 0 < row["share_in_communication"] < 1


@pytest.mark.parametrize(
    ("bandwidth", "rate", "slower"), [(1e6, 1e15, "reading"), (1e15, 1e6, "multiplying")]
)
def test_the_slower_of_reading_and_multiplying_is_the_limit(model, bandwidth, rate, slower):
    read = bench.read_bytes(model.config, 1, 0, FLOAT32)
    for phase, tokens in (("prompt", 2 * PROMPT), ("generation", 2)):
        run = bench.Run(phase, 2, 0, tokens // 2, 1, 1.0, 1.0, [])
        row = bench._row(model, run, bandwidth, rate)
        needs = {"reading": read / 1e6, "multiplying": row["product_flops"] / 1e6}
        assert row["limit_tokens_per_second"] == pytest.approx(tokens / needs[slower])


def test_memory_is_that_of_the_weights_and_the_fullest_cache(report):
    config, weights = tiny_config(UNTIED), tiny_weights(UNTIED)
    whole = sum(array.nbytes for array in weights.values())
    assert report["weight_bytes"] == whole
    assert report["read_bytes"] == whole - weights["model.embed_tokens.weight"].nbytes
    positions = max(BATCHES) * (PROMPT + TOKENS)
    cache = 2 * config.layers * config.kv_heads * config.head_dim * FLOAT32 * positions
    assert report["kv_cache_bytes"] == cache
    assert report["peak_memory_bytes"] > whole


def test_a_tied_embedding_is_read_whole():
    assert bench.read_bytes(tiny_config(TIED), 1, 0, FLOAT32) == sum(
        array.nbytes for array in tiny_weights(TIED).values()
    )


@pytest.mark.parametrize("variant", [UNTIED, TIED, WINDOWED])
def test_flops_are_those_of_the_products_that_are_made(variant, tmp_path, monkeypatch):
    flops = []
    linear = tensor.linear

    def counting(x_NI, w_OI, bias_O=None):
        y_NO = linear(x_NI, w_OI, bias_O)
        flops.append(2 * x_NI.shape[1] * y_NO.size)  # a multiplication and an addition for each
        return y_NO

    decoder = load(variant, tmp_path).decoder
    monkeypatch.setattr(tensor, "linear", counting)
    ids_S = np.arange(PROMPT)
    decoder.forward(pack([(ids_S, decoder.new_cache(PROMPT)) for _ in range(2)]))
    assert bench.product_flops(decoder.config, 1, 0, 2 * PROMPT, 2) == sum(flops)


def test_reports_count_the_flops_of_their_own_steps(report):
    config = tiny_config(UNTIED)
    for row in report["speeds"]:
        prompt = row["phase"] == "prompt"
        tokens = row["batch"] * (PROMPT if prompt else 1)
        assert row["product_flops"] == bench.product_flops(config, 1, 0, tokens, row["batch"])
        # A query at position p sees p + 1 keys; the mean one after the prompt sees PROMPT + 2.
        seen = sum(range(1, PROMPT + 1)) if prompt else PROMPT + (TOKENS + 1) // 2
        per_key = 4 * config.heads * config.head_dim * config.layers
        assert row["attention_flops"] == row["batch"] * seen * per_key


def test_attention_flops_count_the_keys_in_the_window():
    config = tiny_config(WINDOWED)
    visible = sum(
        1
        for window in config.windows
        for query in range(3, 12)
        for key in range(query + 1)
        if window is None or key > query - window
    )
    assert None in config.windows and 5 in config.windows
    flops = 4 * config.heads * config.head_dim * visible
    assert bench.attention_flops(config, 1, 0, 3, 12) == flops


@pytest.mark.parametrize("tp", [1, 2, 3, 6])
def test_the_flops_of_all_ranks_are_those_of_one_where_no_head_is_held_twice(tp):
    config = replace(tiny_config(WINDOWED), kv_heads=6)
    parts = [bench.product_flops(config, tp, rank, 5, 2) for rank in range(tp)]
    assert sum(parts) == bench.product_flops(config, 1, 0, 5, 2)
    parts = [bench.attention_flops(config, tp, rank, 0, 9) for rank in range(tp)]
    assert sum(parts) == bench.attention_flops(config, 1, 0, 0, 9)


def test_collectives_are_those_of_one_step(report):
    config = tiny_config(UNTIED)
    calls = 2 * config.layers + 1
    for row in report["speeds"]:
        tokens = row["batch"] * (PROMPT if row["phase"] == "prompt" else 1)
        entries = {(e["operation"], e["group"]): e for e in row["collectives"]}
        assert set(entries) == {("all_reduce", "tp"), ("all_gather", "tp")}
        assert entries["all_reduce", "tp"]["calls"] == calls
        assert entries["all_reduce", "tp"]["payload_bytes"] == (
            calls * tokens * config.hidden * FLOAT32
        )
        assert entries["all_gather", "tp"]["calls"] == 1
        assert entries["all_gather", "tp"]["wire_bytes"] == 0


def test_the_table_shows_every_speed_with_its_limit_and_share(report):
    text = bench.table(report)
    lines = text.splitlines()
    assert lines[0].startswith(f"{report['model']}: --tp 1 --dp 1, ranks: 1, threads per rank: ")
    assert f"float32, NumPy {np.__version__} ({report['blas']}" in lines[0]
    assert lines[0].endswith(report["mpi"])
    for row in report["speeds"]:
        title = f"{row['phase']} {PROMPT if row['phase'] == 'prompt' else TOKENS}"
        shown = [
            f"{row['batch']}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['limit_tokens_per_second']:.1f}",
            f"{100 * row['share_of_limit']:.0f}",
        ]
        assert any(
            line.startswith(title) and line.removeprefix(title).split()[:4] == shown
            for line in lines
        ), f"{title}: {shown} is not in\n{text}"
    assert text.count("generation: all_reduce") == len(BATCHES)


def test_the_table_names_kernels_that_were_chosen(report):
    assert "OPENBLAS_CORETYPE=Zen," not in bench.table(report)
    chosen = bench.table(report | {"blas_kernels": "Zen"})
    assert f"({report['blas']}, OPENBLAS_CORETYPE=Zen)" in chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens 0 must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens 0 must be at least 1"),
        ({"batches": [1, -2]}, "--batch -2 must be at least 1"),
        ({"batches": []}, "--batch must name at least one number of sequences"),
        ({"repeat": 0}, "--repeat 0 must be at least 1"),
        (
            {"prompt_tokens": 62},
            "--prompt-tokens 62 and --max-tokens 3 need 65 positions, but .* has only 64",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(model, changes, message):
    options = {"prompt_tokens": PROMPT, "max_tokens": TOKENS, "batches": BATCHES, "repeat": 1}
    with pytest.raises(mpishard.UserError, match=f"^{message}$"):
        bench.measure(model, **(options | changes))


def test_a_length_that_changes_a_dynamic_rope_is_refused(tmp_path):
    model = load("llama-dynamic-old", tmp_path)  # trained on 8 positions, has 32
    bench.measure(model, 6, 2, [1], repeat=1)
    with pytest.raises(mpishard.UserError, match="beyond 8 the dynamic rope.*use at most 8$"):
        bench.measure(model, 7, 2, [1], repeat=1)


def test_the_command_has_the_documented_defaults():
    args = make_parser().parse_args(["bench", "MODEL"])
    assert (args.prompt_tokens, args.max_tokens, args.batch, args.repeat) == (512, 32, [1, 8], 3)


def test_ranks_report_as_one(tmp_path):
    """Two replicas of two ranks: both replicas' tokens count, and a rank is a part of the model."""
    directory = write_checkpoint(UNTIED, tmp_path / UNTIED)
    options = ["--tp", "2", "--prompt-tokens", f"{PROMPT}", "--max-tokens", f"{TOKENS}"]
    options += ["--batch", "2", "--repeat", "1", "--json"]
    answer = run_mpi(4, ["-m", "mpishard", "bench", str(directory), *options])
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert (report["layout"], report["ranks"]) == ("--tp 2 --dp 2", 4)
    prompt, generation = report["speeds"]
    assert prompt["tokens_per_second"] * prompt["seconds_per_step"] == pytest.approx(4 * PROMPT)
    assert generation["tokens_per_second"] * generation["seconds_per_step"] == pytest.approx(4)
    config = tiny_config(UNTIED)
    assert report["weight_bytes"] == bench.weight_bytes(config, 2, 0, FLOAT32)
    assert bench.weight_bytes(config, 1, 0, FLOAT32) // 2 < report["weight_bytes"]
    payload = (2 * config.layers + 1) * 2 * config.hidden * FLOAT32
    reduced = generation["collectives"][0]
    assert (reduced["operation"], reduced["group"]) == ("all_reduce", "tp")
    assert reduced["payload_bytes"] == reduced["wire_bytes"] == payload
