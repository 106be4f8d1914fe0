"""What may be typed, and the line to type instead."""

from __future__ import annotations

import argparse
import os
import subprocess
from itertools import product

import pytest

import mpishard
from mpishard.cli import make_parser, retyped
from mpishard.config.layout import CP_ORDERS, CP_PREFILLS, DECODE_MERGES, LAYOUT_OPTIONS, Layout
from mpishard.config.layout_checks import make_layout
from mpishard.errors import UserError

GENERATE = ["generate", "M", "--prompt", "a"]


def parse(*words: str) -> argparse.Namespace:
    return make_parser().parse_args(words)


def test_what_a_command_does_unless_told_otherwise():
    generate = vars(parse(*GENERATE))
    assert generate == {
        "command": "generate",
        "model": "M",
        "ignore_config": [],
        "prompts": [("--prompt", "a")],
        "chat": False,
        "json": False,
        "generation_config": "none",
        **dict.fromkeys("max_tokens temperature top_k top_p min_p seed n logprobs".split()),
        "repetition_penalty": None,
        "presence_penalty": None,
        "frequency_penalty": None,
        "logit_bias": [],
        "stop": [],
        "ignore_eos": False,
        "stop_token_ids": (),
        "skip_special_tokens": True,
        "add_bos": None,
        "chat_template_kwargs": None,
        "include_stop_str_in_output": False,
        "chunked_prefill_size": None,
        "expert_load": None,
        "record_routing": None,
        "replay_routing": None,
        "tp": None,
        "cp": 1,
        "dp": None,
        "sequence_parallel": False,
        "flash_decoding": False,
        "cp_prefill": None,
        "cp_order": None,
        "decode_merge": None,
        "cp_kv_cache_interleave_size": None,
        "ep": None,
        "moe_token_dispatcher": None,
        "expert_capacity_factor": None,
        "token_drop_policy": None,
        "expert_placement": None,
        "max_model_len": None,
        "compute_dtype": "float32",
        "timeout": 1800.0,
        "check_collectives": False,
    }
    batch = vars(parse("batch", "M", "--input", "I", "--output", "O"))
    for name in ("command", "prompts", "json", "record_routing", "replay_routing"):
        del generate[name]
    assert batch == generate | {
        "command": "batch",
        "input": "I",
        "output": "O",
        "max_num_batched_tokens": 2048,
        "max_num_seqs": None,
        "kv_cache_memory_bytes": None,
    }
    assert vars(parse("shard", "M", "OUT", "--tp", "2"))["dtype"] == "float32"
    assert parse("inspect", "M").verify is False
    assert parse("logits", "M", "--input", "I", "--output", "O").hidden_states is False
    bench = parse("bench", "M")
    assert (bench.prompt_tokens, bench.max_tokens) == ([512], 32)
    assert (bench.batch, bench.repeat) == ([1, 8], 3)


COMMANDS = [
    "generate M --prompt a",
    "batch M --input I --output O",
    "logits M --input I --output O",
    "bench M",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_layout_flags_are_the_same_everywhere(command):
    long = "--tensor-parallel-size=2 --data-parallel-size 3 --context-parallel-size 4"
    args = parse(*command.split(), *long.split(), "--compute-dtype", "float64")
    assert (args.tp, args.dp, args.cp, args.compute_dtype) == (2, 3, 4, "float64")
    args = parse(*command.split(), "--tp", "2", "--dp=3", "--cp", "4", "--max-model-len=40000")
    assert (args.tp, args.dp, args.cp, args.max_model_len) == (2, 3, 4, 40000)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_layout_can_be_typed_as_it_is_written(command):
    for forms in product(
        (True, False), (True, False), CP_PREFILLS, CP_ORDERS, DECODE_MERGES, (1, 3)
    ):
        layout = Layout(2, 3, 4, *forms)
        args = parse(*command.split(), *str(layout).split())
        layout_options = {name: getattr(args, name) for name in LAYOUT_OPTIONS}
        assert make_layout(24, args.tp, args.dp, args.cp, **layout_options) == layout


def test_switches_of_experts_can_be_typed_as_they_are_written():
    layout = Layout(
        2,
        ep=2,
        moe_token_dispatcher="all-gather",
        expert_capacity_factor=1.25,
        token_drop_policy="position",
        expert_placement="p.json",
    )
    assert str(layout).endswith(
        "--ep 2 --moe-token-dispatcher all-gather --expert-capacity-factor 1.25 "
        "--token-drop-policy position --expert-placement p.json"
    )
    args = parse("bench", "M", *str(layout).split())
    layout_options = {name: getattr(args, name) for name in LAYOUT_OPTIONS}
    assert make_layout(2, args.tp, args.dp, args.cp, **layout_options) == layout


def test_some_flags_may_be_repeated():
    words = (
        "--prompt - --prompt-file F --prompt=b --stop x --stop=y --logit-bias 5=2 --logit-bias=6=-1"
    )
    args = parse(*GENERATE, *words.split())
    assert args.prompts == [
        ("--prompt", "a"),
        ("--prompt", "-"),
        ("--prompt-file", "F"),
        ("--prompt", "b"),
    ]
    assert args.stop == ["x", "y"] and args.logit_bias == [(5, 2.0), (6, -1.0)]
    assert parse("generate", "M").prompts == [], "what was given before is not kept"


def test_other_names_of_a_flag():
    assert parse(*GENERATE, "--max-new-tokens", "7").max_tokens == 7


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--tp", "2", "--tp", "4"], "argument --tp/--tensor-parallel-size: given twice"),
        (["--tp", "2", "--tensor-parallel-size=2"], "--tensor-parallel-size: given twice"),
        (["--seed", "1", "--seed", "1"], "argument --seed: given twice"),
        (["--tp", "0"], "--tp/--tensor-parallel-size: 0 must be at least 1"),
        (["--dp", "-2"], "--dp/--data-parallel-size: -2 must be at least 1"),
        (["--tp", "two"], "--tensor-parallel-size: 'two' is not a whole number"),
        (["--tp", "1.5"], "'1.5' is not a whole number"),
        (["--max-tokens", "0"], "argument --max-tokens/--max-new-tokens: 0 must be at least 1"),
        (["--max-tokens", "9" * 5000], "is not a whole number"),
        (["--temperature", "warm"], "argument --temperature: 'warm' is not a number"),
        (["--temperature", "nan"], "argument --temperature: 'nan' is not a number"),
        (["--top-p", "nan"], "argument --top-p: 'nan' is not a number"),
        (["--compute-dtype", "float16"], "argument --compute-dtype: invalid choice: 'float16'"),
        (["--cp", "0"], "argument --cp/--context-parallel-size: 0 must be at least 1"),
        (["--cp", "2", "--context-parallel-size=2"], "--context-parallel-size: given twice"),
        (["--sequence-parallel", "2"], "unrecognized arguments: 2"),
        (["--flash-decoding=yes"], "argument --flash-decoding: ignored explicit argument 'yes'"),
        (["--cp-prefill", "rong"], "argument --cp-prefill: invalid choice: 'rong' (choose from"),
        (["--cp-order", "zag"], "argument --cp-order: invalid choice: 'zag' (choose from"),
        (["--decode-merge", "sum"], "argument --decode-merge: invalid choice: 'sum' (choose from"),
        (
            ["--cp-kv-cache-interleave-size", "0"],
            "argument --cp-kv-cache-interleave-size: 0 must be at least 1",
        ),
        (
            ["--cp-kv-cache-interleave-size", "all"],
            "argument --cp-kv-cache-interleave-size: 'all' is not a whole number",
        ),
        (["--max-model-len", "0"], "argument --max-model-len: 0 must be at least 1"),
        (["--chunked-prefill-size", "0"], "argument --chunked-prefill-size: 0 must be at least 1"),
        (
            ["--chunked-prefill-size", "8", "--chunked-prefill-size=9"],
            "argument --chunked-prefill-size: given twice",
        ),
        (["--ep", "0"], "argument --ep/--expert-parallel-size: 0 must be at least 1"),
        (["--temp", "1"], "unrecognized arguments: --temp 1"),
        (["--stop"], "argument --stop: expected one argument"),
        (["other"], "unrecognized arguments: other"),
    ],
)
def test_what_cannot_be_typed(words, sentence):
    with pytest.raises(UserError) as refusal:
        parse(*GENERATE, *words)
    assert sentence in str(refusal.value)
    assert str(refusal.value).endswith("--help`")


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("", "required: COMMAND; see `mpishard --help`"),
        ("generat M", "invalid choice: 'generat' (choose from"),
        ("generate --prompt a", "required: MODEL"),
        ("shard M OUT", "required: --tp/--tensor-parallel-size"),
        ("shard M --tp 2", "required: OUT"),
        ("shard M OUT --tp 2 --dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("logits M --input I", "required: --output"),
        ("bench M --batch 1 0", "argument --batch: 0 must be at least 1"),
        ("bench M --repeat 0", "argument --repeat: 0 must be at least 1"),
        ("bench M --chunked-prefill-size 8", "unrecognized arguments: --chunked-pre"),
        ("shard M OUT --tp 2 --dp 2", "unrecognized arguments: --dp 2"),
        ("inspect M --max-model-len 8", "unrecognized arguments: --max-model-len 8"),
    ],
)
def test_what_is_missing_or_wrong(line, sentence):
    with pytest.raises(UserError) as refusal:
        parse(*line.split())
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("command", ["", "shard", "inspect", "generate", "logits", "bench"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*command.split(), "--help")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mpishard {command}".strip())


def test_version(capsys):
    with pytest.raises(SystemExit):
        parse("--version")
    assert capsys.readouterr().out == f"{mpishard.__version__}\n"


@pytest.mark.parametrize(
    "typed, right",
    [
        ("generate M --tp 2 --prompt a", "generate M --tp 4 --prompt a"),
        ("generate M --tp=2 --dp 3", "generate M --tp=4 --dp 3"),
        ("bench M --tensor-parallel-size 2", "bench M --tensor-parallel-size 4"),
        ("bench M --tensor-parallel-size=2", "bench M --tensor-parallel-size=4"),
        ("bench M", "bench M"),
        (
            "bench M --cp 2 --tp 2 --kv-interleave 2 --cp-order contiguous --sequence-parallel",
            "bench M --cp 2 --tp 4 --kv-interleave 2 --cp-order contiguous --sequence-parallel",
        ),
    ],
)
def test_the_line_for_another_tp(typed, right):
    assert retyped(["/usr/bin/mpishard", *typed.split()], 4) == f"mpishard {right}"
    module = "/lib/mpishard/__main__.py"
    assert retyped([module, *typed.split()], 4) == f"python -m mpishard {right}"


def test_the_line_can_be_pasted_into_a_shell():
    assert retyped(["mpishard", "generate", "my model", "--prompt", "it's"], 1) == (
        "mpishard generate 'my model' --prompt 'it'\"'\"'s'"
    )


@pytest.mark.parametrize("word", ["a\nb", "\\\t'\"$x`", "\x1b[0m é \u2028", "caf\udce9"])
def test_the_line_is_one_whatever_was_typed(word):
    line = retyped(["mpishard", "generate", "M", "--prompt", word], 1)
    assert line.isprintable()
    echo = line.replace("mpishard generate M --prompt", "printf %s")
    assert subprocess.check_output(["bash", "-c", echo]) == os.fsencode(word)


@pytest.mark.parametrize(
    "text, bytes_",
    [("1", 1), ("500MB", 500 * 10**6), ("2GiB", 2**31), ("1.5 KiB", 1536), ("3T", 3 * 10**12)],
)
def test_sizes_have_units(text, bytes_):
    args = parse("batch", "M", "--input", "I", "--output", "O", "--kv-cache-memory-bytes", text)
    assert args.kv_cache_memory_bytes == bytes_
