"""What `mpishard bench` reports: everything but the seconds, held to independent arithmetic."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toys
from mpi_runner import run_mpi
from tiny_models import tiny_config, tiny_weights, write_checkpoint

import mpishard
from mpishard.arithmetic import linear
from mpishard.bench import measure, measurement, memory, probes, roofline, table
from mpishard.cli import make_parser
from mpishard.config.layout import Layout
from mpishard.config.weight_sharding import WeightSharding
from mpishard.model import Decoder
from mpishard.sequences.step import pack

PROMPTS, TOKENS, BATCHES = [7, 20], 3, [1, 4]
PROMPT = PROMPTS[0]
UNTIED, TIED, WINDOWED, SHARED = "llama-mha", "llama-gqa", "qwen3-mixed", "llama-mqa"
FLOAT32, FLOAT64 = 4, 8
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(probes, "NODE_WORKING_SET", 2**20)
    monkeypatch.setattr(probes, "RANK_WORKING_SET", 2**20)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> mpishard.Model:
    return load(UNTIED, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def report(model) -> dict:
    return measure(model, PROMPTS[::-1], TOKENS, BATCHES, repeat=2)


def load(variant: str, directory: Path) -> mpishard.Model:
    return mpishard.load(write_checkpoint(variant, directory / variant))


def ranks_of(layout: Layout, variant: str) -> list[Decoder]:
    """`variant` on every rank of `layout`, in float64: enough of a mesh to count with."""
    decoders = []
    for rank in range(layout.world_size):
        places = zip((layout.dp, layout.cp, layout.tp), layout.coordinates(rank), strict=True)
        dp, cp, tp = (SimpleNamespace(size=size, rank=rank) for size, rank in places)
        sharding = WeightSharding(layout.tp)
        mesh: Any = SimpleNamespace(
            layout=layout, dp=dp, cp=cp, tp=tp, weight_sharding=sharding, shard_index=tp.rank
        )
        decoders.append(toys.toy(variant, mesh))
    return decoders


def seen(config, queries, keys) -> int:
    """The pairs of all layers in which one of the `queries` sees one of the `keys`, one by one."""
    return sum(
        key <= query and (window is None or key > query - window)
        for window, query, key in product(config.windows, queries, keys)
    )


def test_a_report_has_every_phase_of_every_length_and_batch_in_order(report):
    phases = [(row["prompt_tokens"], row["batch"], row["phase"]) for row in report["speeds"]]
    assert phases == list(product(PROMPTS, BATCHES, ("prefill", "decode")))
    rows = [(row["prompt_tokens"], row["batch"]) for row in report["memory"]]
    assert rows == list(product(PROMPTS, BATCHES))


def test_a_report_says_what_was_measured_and_where(report, model):
    said = {name: report[name] for name in ("model", "layout", "ranks", "dtype", "numpy")}
    assert said == {
        "model": str(model.path),
        "layout": "--tp 1 --dp 1",
        "ranks": 1,
        "dtype": "float32",
        "numpy": np.__version__,
    }
    assert (report["prompt_tokens"], report["max_tokens"], report["repeat"]) == (PROMPTS, TOKENS, 2)
    assert report["threads"] >= 1
    assert "blas" in report["blas"].lower() or "mkl" in report["blas"].lower()


def test_a_report_is_json(report):
    assert json.loads(json.dumps(report)) == report


def tokens_of(row: dict) -> int:
    return row["batch"] * (row["prompt_tokens"] if row["phase"] == "prefill" else 1)


def test_speeds_and_limits_agree_with_each_other(report):
    for row in report["speeds"]:
        tokens, speed = tokens_of(row), row["tokens_per_second"]
        bandwidth, rate = row["bandwidth_bytes_per_second"], row["product_flops_per_second"]
        assert speed * row["seconds_per_step"] == pytest.approx(tokens)
        limit = row["roofline_tokens_per_second"]
        assert row["fraction_of_roofline"] == pytest.approx(speed / limit)
        least = max(report["read_bytes"] / bandwidth, row["product_flops"] / rate)
        assert tokens / limit == pytest.approx(least)
        limit = row["roofline_with_attention_tokens_per_second"]
        assert row["fraction_of_roofline_with_attention"] == pytest.approx(speed / limit)
        read = report["read_bytes"] + row["kv_cache_bytes_read"]
        flops = row["product_flops"] + row["attention_flops"]
        assert tokens / limit == pytest.approx(max(read / bandwidth, flops / rate))
        assert 0 < row["share_in_communication"] < 1


def test_the_slower_of_reading_and_multiplying_is_the_limit():
    work = roofline.StepCost(product_flops=600, attention_flops=300, weight_bytes=50, cache_bytes=7)
    fast, slow = 1e9, 1.0
    assert work.seconds(bandwidth=slow, rate=fast) == 50
    assert work.seconds(bandwidth=fast, rate=slow) == 600
    assert work.seconds_with_attention(bandwidth=slow, rate=fast) == 57
    assert work.seconds_with_attention(bandwidth=fast, rate=slow) == 900


def test_seconds_of_arithmetic_are_a_part_of_the_step(report):
    for row in report["speeds"]:
        if row["phase"] == "prefill":
            assert 0 < row["attention_seconds"] < row["least_arithmetic_seconds"]
            assert row["least_arithmetic_seconds"] == row["most_arithmetic_seconds"]
            communication = row["share_in_communication"] * row["seconds_per_step"]
            parts = row["most_arithmetic_seconds"] + communication
            assert parts == pytest.approx(row["seconds_per_step"])
            assert row["isendrecv_seconds"] == 0


def test_warming_up_and_limits_stay_short(model, monkeypatch):
    """Whatever is not measured must not grow with a prompt that takes minutes."""
    fed, limited = [], []
    run, products = measurement._run, measurement.gemm_probe

    def watched_run(model, batch, tokens, *rest):
        fed.append((batch, tokens))
        return run(model, batch, tokens, *rest)

    def watched_products(layer):
        multiply, flops = products(layer)
        limited.append(flops)
        return multiply, flops

    monkeypatch.setattr(measurement, "WARM_UP_TOKENS", 16)
    monkeypatch.setattr(measurement, "_run", watched_run)
    monkeypatch.setattr(measurement, "gemm_probe", watched_products)
    measure(model, [40, 60], 1, [1, 4], repeat=1)
    assert fed == [(1, 16), (4, 4), (1, 40), (4, 40), (1, 60), (4, 60)]
    layer = sum(
        w.size for name, w in tiny_weights(UNTIED).items() if "layers.0." in name and w.ndim == 2
    )
    assert limited == [2 * probes.PRODUCT_ROWS * layer]


def test_weights_and_caches_are_those_of_the_model(report):
    config, weights = tiny_config(UNTIED), tiny_weights(UNTIED)
    whole = sum(array.nbytes for array in weights.values())
    assert report["weight_bytes"] == whole
    assert report["read_bytes"] == whole - weights["model.embed_tokens.weight"].nbytes
    per_position = 2 * config.layers * config.kv_heads * config.head_dim * FLOAT32
    for row in report["memory"]:
        positions = row["batch"] * (row["prompt_tokens"] + TOKENS)
        assert row["kv_cache_bytes"] == positions * per_position
        assert row["peak_bytes"] > whole


def test_activations_are_what_a_prompt_takes_beyond_weights_and_cache(report):
    config = tiny_config(UNTIED)
    for row in report["memory"]:
        tokens = row["batch"] * row["prompt_tokens"]
        assert row["residual_stream_bytes"] == tokens * config.hidden * FLOAT32
        # When the network multiplies, there are gate and up, and the stream with and without norm.
        network = tokens * (2 * config.ffn + 2 * config.hidden) * FLOAT32
        everything = network + tokens * (config.ffn + 8 * config.hidden) * FLOAT32
        assert network <= row["activations_bytes"] < everything + 200_000
    assert not tracemalloc.is_tracing()


def test_the_peak_is_not_that_of_what_came_before(model):
    size = 200 * 2**20
    large = np.ones(size, np.uint8)
    before = model.peak_memory()
    del large
    report = measure(model, [PROMPT], 1, [1], repeat=1)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        assert report["memory"][0]["peak_bytes"] < before - size / 2
    except OSError:  # the system does not let a process forget
        assert report["memory"][0]["peak_bytes"] >= before


@pytest.mark.parametrize("variant", [UNTIED, WINDOWED])
def test_activations_are_those_of_a_step_through_all_layers(variant, tmp_path):
    model = load(variant, tmp_path)
    decoder = model.decoder
    step = pack([(np.zeros(30, np.int64), decoder.allocate_cache(30)) for _ in range(2)])
    tracemalloc.start()
    decoder.forward(step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory.memory_of(model, 2, 30, 1)["activations_bytes"] == pytest.approx(peak, rel=0.05)


def test_a_mixture_computes_a_row_for_each_expert_of_each_token(tmp_path):
    model = load("mixtral-full", tmp_path)
    moe, hidden = model.config.moe, model.config.hidden
    report = measure(model, [PROMPT], 1, [2], repeat=1)
    prompt, generation = report["speeds"]
    rows = 2 * PROMPT * moe.top_k * sum(moe.layers)
    assert prompt["fewest_expert_rows"] == prompt["most_expert_rows"] == rows
    assert prompt["expert_rows_sent"] == prompt["expert_rows_sent_if_even"] == 0
    flops = prompt["moe_roofline_seconds"] * prompt["product_flops_per_second"]
    assert flops == pytest.approx(rows * 2 * 3 * hidden * moe.moe_intermediate_size)
    assert prompt["moe_seconds"] > 0 and "moe_seconds" not in generation
    assert "MoE layers of a step" in table(report)


def test_a_watched_model_answers_as_it_would_unwatched(model):
    decoder = model.decoder
    watched = probes.TimedDecoder(decoder)
    steps = [pack([(np.arange(PROMPT), decoder.allocate_cache(PROMPT))]) for _ in range(2)]
    expected = decoder.forward(steps[0])
    np.testing.assert_array_equal(watched.forward(steps[1]), expected)
    assert watched.attention_seconds > 0


def test_a_tied_embedding_is_read_whole():
    assert roofline.read_bytes(tiny_config(TIED), WeightSharding(1), 0, FLOAT32) == sum(
        array.nbytes for array in tiny_weights(TIED).values()
    )


@pytest.mark.parametrize("variant", [UNTIED, TIED, WINDOWED])
def test_flops_are_those_of_the_products_that_are_made(variant, tmp_path, monkeypatch):
    flops = []
    right = linear.linear

    def counting(x_NI, w_OI, bias_O=None):
        y_NO = right(x_NI, w_OI, bias_O)
        flops.append(2 * x_NI.shape[1] * y_NO.size)  # a multiplication and an addition for each
        return y_NO

    decoder = load(variant, tmp_path).decoder
    monkeypatch.setattr(linear, "linear", counting)
    monkeypatch.setattr(linear, "use_small_gemm", lambda rows: False)
    ids_S = np.arange(PROMPT)
    decoder.forward(pack([(ids_S, decoder.allocate_cache(PROMPT)) for _ in range(2)]))
    assert roofline.product_flops(decoder.config, WeightSharding(1), 0, 2 * PROMPT, 2) == sum(flops)


def test_reports_count_the_flops_of_their_own_steps(report):
    config = tiny_config(UNTIED)
    per_key = 4 * config.heads * config.head_dim * config.layers
    for row in report["speeds"]:
        prompt, length = row["phase"] == "prefill", row["prompt_tokens"]
        flops = roofline.product_flops(config, WeightSharding(1), 0, tokens_of(row), row["batch"])
        assert row["product_flops"] == flops
        # A query at position p sees p + 1 keys; the middle one after the prompt sees two more.
        keys = sum(range(1, length + 1)) if prompt else length + (TOKENS + 1) // 2
        assert row["attention_flops"] == row["batch"] * keys * per_key
        key_and_value = 2 * config.kv_heads * config.head_dim * config.layers * FLOAT32
        read = 0 if prompt else row["batch"] * keys * key_and_value
        assert row["kv_cache_bytes_read"] == read


@pytest.mark.parametrize("queries", [range(12), [0, 1, 10, 11], [7], []])
@pytest.mark.parametrize("keys", [range(12), [0, 3, 6, 9], [11], []])
def test_visible_keys_are_neither_later_nor_before_the_window(queries, keys):
    config = tiny_config(WINDOWED)
    assert None in config.windows and 5 in config.windows
    positions = [np.array(at, np.int64) for at in (queries, keys)]
    assert roofline.visible_keys(config, *positions) == seen(config, queries, keys)


@pytest.mark.parametrize("tp", [1, 2, 3, 6])
def test_the_product_flops_of_all_ranks_are_those_of_one_where_no_head_is_held_twice(tp):
    config = replace(tiny_config(WINDOWED), kv_heads=6)
    parts = [roofline.product_flops(config, WeightSharding(tp), rank, 5, 2) for rank in range(tp)]
    assert sum(parts) == roofline.product_flops(config, WeightSharding(1), 0, 5, 2)


LAYOUTS = [
    Layout(),
    Layout(tp=2, sequence_parallel=True),
    Layout(tp=4, flash_decoding=True),
    Layout(cp=2),
    Layout(cp=3, cp_order="contiguous", cp_kv_cache_interleave_size=2),
    Layout(tp=4, cp=2, flash_decoding=True, cp_kv_cache_interleave_size=3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("variant", [TIED, WINDOWED])
def test_ranks_share_the_attention_of_a_prompt(layout, variant):
    """A query head of a token is one rank's, with all the keys that it sees."""
    config, tokens = tiny_config(variant), 13
    works = [roofline.prefill_cost(rank, 3, tokens) for rank in ranks_of(layout, variant)]
    whole = seen(config, range(tokens), range(tokens))
    flops = 3 * 4 * config.heads * config.head_dim * whole
    assert sum(work.attention_flops for work in works) == flops
    assert {work.cache_bytes for work in works} == {0}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("variant", [TIED, WINDOWED])
def test_ranks_share_the_attention_of_a_generated_token(layout, variant):
    """A query head meets each key on one rank; a divided cache is read by one rank only, an
    undivided one by each that holds it."""
    config, start, stop = tiny_config(variant), 11, 12
    ranks = ranks_of(layout, variant)
    works = [roofline.decode_cost(rank, 3, start, stop) for rank in ranks]
    whole = 3 * seen(config, [start], range(stop))
    flops = 4 * config.heads * config.head_dim * whole
    assert sum(work.attention_flops for work in works) == flops
    held = sum(rank.kv_heads for rank in ranks) // layout.cp
    heads = config.kv_heads if layout.flash_decoding else held
    read = 2 * heads * config.head_dim * FLOAT64 * whole
    assert sum(work.cache_bytes for work in works) == read


def test_zigzag_divides_the_work_of_a_prompt_evenly_and_contiguous_blocks_do_not():
    def flops(layout: Layout) -> list[int]:
        return [
            roofline.prefill_cost(rank, 1, 64).attention_flops for rank in ranks_of(layout, TIED)
        ]

    even, zigzag = flops(Layout(cp=2))
    assert even == zigzag
    first, second = flops(Layout(cp=2, cp_order="contiguous"))
    assert second > 2.5 * first


def test_the_tokens_of_a_prompt_are_divided_over_context_parallel_ranks():
    first, second = [roofline.prefill_cost(rank, 2, 9) for rank in ranks_of(Layout(cp=2), UNTIED)]
    # Zigzag: blocks of 3, 2, 2, 2; the first rank has the first and the last, which is answered.
    config = tiny_config(UNTIED)
    assert first.product_flops == roofline.product_flops(config, WeightSharding(1), 0, 2 * 5, 2)
    assert second.product_flops == roofline.product_flops(config, WeightSharding(1), 0, 2 * 4, 0)


def test_the_mean_generation_step_stands_for_all():
    rank = ranks_of(Layout(), UNTIED)[0]
    steps = [roofline.decode_cost(rank, 2, p, p + 1).attention_flops for p in (7, 8, 9)]
    assert roofline.decode_cost(rank, 2, 7, 10).attention_flops == sum(steps) / 3


def test_collectives_are_those_of_one_step(report):
    config = tiny_config(UNTIED)
    calls = 2 * config.layers + 1
    for row in report["speeds"]:
        entries = {(e["operation"], e["group"]): e for e in row["collectives"]}
        # The second all_gather tells the context-parallel ranks, here one, what was chosen.
        assert set(entries) == {("all_reduce", "tp"), ("all_gather", "tp"), ("all_gather", "cp")}
        assert entries["all_reduce", "tp"]["calls"] == calls
        assert entries["all_reduce", "tp"]["payload_bytes"] == (
            calls * tokens_of(row) * config.hidden * FLOAT32
        )
        assert entries["all_gather", "tp"]["calls"] == 1
        assert entries["all_gather", "tp"]["wire_bytes"] == 0


def test_the_table_shows_every_speed_with_its_limit_and_share(report):
    text = table(report)
    lines = text.splitlines()
    assert lines[0].startswith(f"{report['model']}: --tp 1 --dp 1, ranks: 1, threads per rank: ")
    assert f"float32, NumPy {np.__version__} ({report['blas']}" in lines[0]
    assert lines[0].endswith(report["mpi"])
    for row in report["speeds"]:
        length = row["prompt_tokens"]
        prompt = row["phase"] == "prefill"
        title = f"prefill {length}" if prompt else f"decode {TOKENS} after {length}"
        shown = [
            f"{row['batch']}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['roofline_tokens_per_second']:.1f}",
            f"{100 * row['fraction_of_roofline']:.0f} %",
            f"{row['roofline_with_attention_tokens_per_second']:.1f}",
            f"{100 * row['fraction_of_roofline_with_attention']:.0f} %",
            f"{1e3 * row['seconds_per_step']:.2f}",
        ]
        assert line_of(lines, title, " ".join(shown)), f"{title}: {shown} is not in\n{text}"
    assert text.count(f"decode {TOKENS} after {PROMPT}: all_reduce") == len(BATCHES)


def line_of(lines: list[str], title: str, words: str) -> bool:
    """Whether a line begins with `title` and goes on with `words`, whatever the spaces."""
    return any(
        line.startswith(title) and " ".join(line.removeprefix(title).split()).startswith(words)
        for line in lines
    )


def test_the_table_shows_memory_and_balance(report):
    lines = table(report).splitlines()
    for row in report["memory"]:
        kinds = ("kv_cache", "residual_stream", "activations", "peak")
        figures = [report["weight_bytes"], *(row[f"{kind}_bytes"] for kind in kinds)]
        title = f"prefill {row['prompt_tokens']}, decode {TOKENS}"
        words = [f"{row['batch']}", *(f"{figure / 1e6:.1f}" for figure in figures)]
        assert line_of(lines, title, " ".join(words))
    example = {
        "least_arithmetic_seconds": 2.0,
        "most_arithmetic_seconds": 2.5,
        "attention_seconds": 0.5,
        "attention_flops": int(4e9),
        "product_flops_per_second": 16e9,
        "isendrecv_seconds": 0.25,
        "seconds_per_step": 5.0,
    }
    speeds = [report["speeds"][0] | example]
    lines = table(report | {"speeds": speeds}).splitlines()
    shown = "1 2.000 2.500 25 % 0.500 8.0 50 % 0.250 5 %"
    assert line_of(lines, f"prefill {PROMPT}", shown)


def test_the_table_names_the_kernels_if_blas_tells_them(report):
    zen = table(report | {"blas_kernels": "Zen"})
    assert f"({report['blas']}, Zen kernels)" in zen
    assert f"({report['blas']})" in table(report | {"blas_kernels": ""})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": [7, 0]}, "--prompt-tokens 0 must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens 0 must be at least 1"),
        ({"batches": [1, -2]}, "--batch -2 must be at least 1"),
        ({"prompt_tokens": []}, "--prompt-tokens must name at least one length"),
        ({"batches": []}, "--batch must name at least one number of sequences"),
        ({"repeat": 0}, "--repeat 0 must be at least 1"),
        (
            {"prompt_tokens": [62, 8]},
            "--prompt-tokens 62 and --max-tokens 3 need 65 positions, but .* has only 64; "
            "--max-model-len 65 allows them",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(model, changes, message):
    options = {"prompt_tokens": PROMPTS, "max_tokens": TOKENS, "batches": BATCHES, "repeat": 1}
    with pytest.raises(mpishard.UserError, match=f"^{message}$"):
        measure(model, **(options | changes))


def test_a_length_that_changes_a_dynamic_rope_is_refused(tmp_path):
    model = load("llama-dynamic-old", tmp_path)  # trained on 8 positions, has 32
    measure(model, [6], 2, [1], repeat=1)
    with pytest.raises(mpishard.UserError, match="beyond 8 the dynamic rope.*use at most 8$"):
        measure(model, [7], 2, [1], repeat=1)


def test_the_command_has_the_documented_defaults():
    args = make_parser().parse_args(["bench", "MODEL"])
    assert (args.prompt_tokens, args.max_tokens, args.batch, args.repeat) == ([512], 32, [1, 8], 3)


def test_layouts_are_compared_in_turn(tmp_path):
    """The script that makes one rank and layouts of all take turns: a line for each in each round,
    ratios to one rank, and what the layout is refused for."""
    words = [str(SCRIPTS / "compare_layouts.py"), str(write_checkpoint(TIED, tmp_path / TIED))]
    lengths = ["--rounds", "2", "--prompt-tokens", "9", "--max-tokens", "3"]
    compared = run_mpi(2, [*words, "tp=2,sequence_parallel", "dp=2", *lengths])
    assert compared.returncode == 0, compared.stderr
    rows = [line.split() for line in compared.stdout.splitlines()[2:]]
    names = [["one", "rank"], ["tp=2,sequence_parallel"], ["dp=2"]]
    turns = [number for number in ("1", "2", "median") for _ in names]
    assert [row[0] for row in rows] == turns
    for row, name in zip(rows, names * 3, strict=True):
        assert row[1 : 1 + len(name)] == name
        figures = row[1 + len(name) :]
        assert figures[2::3] == ["x"] * 3 and all(float(speed) > 0 for speed in figures[::3])
        if name == names[0]:
            assert figures[1::3] == ["1.00"] * 3
    refused = run_mpi(2, [*words, "tp=3", *lengths])
    assert refused.returncode == 2 and "--tp 3 does not divide the 2 ranks" in refused.stderr
