"""Tests of the tests: mistakes that are easy to make must turn the suite red.

A plugin that pytest and the ranks it starts load makes a mistake before a test and takes it back
afterwards, in short runs of the parallel tests on two ranks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = {
    "sublayers": "tests/parallel/test_sublayers.py",
    "model": "tests/parallel/test_model.py",
    "schedule": "tests/parallel/test_schedule.py",
    "sampling": "tests/parallel/test_sampling.py",
    "linear_attention": "tests/parallel/test_linear_attention.py",
    "cross_attention": "tests/parallel/test_cross_attention.py",
}

# The variant in which a mistake is made, if not the usual one: it uses the option concerned.
USUAL = "llama-bias"
VARIANT_OF = {
    "norms that forget their offset": "gemma3-old",
    "norms on the other side of their sub-layers": "gemma3-old",
    "a factor of sub-layers that is forgotten": "granite-plain",
    "layers without rope that are rotated": "smollm3-nope",
    "queries that do not grow with their position": "ministral3-scaled",
    "pairs of halves where neighbours are rotated": "glm-partial",
    "short factors in long sequences": "phi3-longrope",
    "norms before the rotation": "hunyuan_v1_dense-alpha",
    "norms over the heads of one rank": "olmo2-plain",
    "windows in place of chunks": "llama4-chunks",
    "weights of the outputs of experts": "llama4-chunks",
    "sums without a lower bound": "ernie4_5_moe-clamped",
    "a parallel residual without its feed-forward network": "gpt_neox-parallel",
    "biases of a parallel residual that are added twice": "gpt_neox-parallel",
    "positions off by one": "gpt2-layers",
    "slopes of the heads of another rank": "bloom-six",
    "norms that keep the mean": "falcon-new",
    "an expert's tokens counted from each chunk on": "switch_transformers-mixed",
    "an encoder that does not see later tokens": "switch_transformers-mixed",
}

# Name: (what is patched, the file that must go red, a test of it that must fail).
MISTAKES = {
    "nothing at all": ("", "sublayers", None),
    "a dropped reduction": (
        "from mpishard.parallel import tensor\ntensor.all_reduce = lambda x, group: x",
        "sublayers",
        "test_feed_forward",
    ),
    "one reduction too many": (
        "from mpishard.parallel import tensor\n"
        "once = tensor.all_reduce\n"
        "tensor.all_reduce = lambda x, group: once(once(x, group) / group.size, group)",
        "schedule",
        "test_tensor_parallelism_is_two_all_reduces_a_layer_and_one_for_the_embedding",
    ),
    "a bias added on every rank": (
        "from mpishard.arithmetic.linear import Linear\n"
        "Linear.add_bias = lambda self, y: y if self.bias is None else y + 2 * self.bias",
        "sublayers",
        "test_attention",
    ),
    "a wrong split axis": (
        "from dataclasses import replace\n"
        "import toys\n"
        "right = toys.specs_of_shard\n"
        "def wrong(*of):\n"
        "    return [replace(w, axis=0) if w.field == 'down' else w for w in right(*of)]\n"
        "toys.specs_of_shard = wrong",
        "sublayers",
        "test_feed_forward",
    ),
    "a convolution that does not see the rank before": (
        "import numpy as np\n"
        "from mpishard.parallel import linear_attention\n"
        "right = linear_attention._rows_before\n"
        "linear_attention._rows_before = lambda *of: np.zeros_like(right(*of))",
        "linear_attention",
        "test_states_are_carried_through_chunks_batches_and_decode",
    ),
    "runs composed from the last to the first": (
        "from mpishard.parallel import linear_attention\n"
        "right = linear_attention.runs_of\n"
        "linear_attention.runs_of = lambda chunks: right(chunks)[::-1]",
        "linear_attention",
        "test_states_are_carried_through_chunks_batches_and_decode",
    ),
    "an expert's tokens counted from each chunk on": (
        "import numpy as np\n"
        "from mpishard.parallel import expert\n"
        "right = expert.keep_mask\n"
        "def wrong(ids, capacity, step, mesh):\n"
        "    for segment in step.segments:\n"
        "        segment.cache.expert_counts_LE[:] = 0\n"
        "    return right(ids, capacity, step, mesh)\n"
        "expert.keep_mask = wrong",
        "cross_attention",
        "test_every_phase_is_the_references",
    ),
    "an encoder that does not see later tokens": (
        "from dataclasses import replace\n"
        "from mpishard import layers\n"
        "right = layers.AttentionSpec\n"
        "layers.AttentionSpec = lambda *of, **more: right(*of, **more | {'causal': True})",
        "cross_attention",
        "test_every_phase_is_the_references",
    ),
    "a swapped key/value head": (
        "from mpishard.config import weight_specs\n"
        "right = weight_specs.kv_heads_of\n"
        "weight_specs.kv_heads_of = lambda config, tp, rank: right(config, tp, tp - 1 - rank)",
        "sublayers",
        "test_attention",
    ),
    "a cache one position late": (
        "from mpishard.sequences.kv_cache import KVCache\n"
        "read = KVCache.read\n"
        "def late(self, layer):\n"
        "    k_gTK, v_gTK, at_T = read(self, layer)\n"
        "    return k_gTK[:, :-1], v_gTK[:, :-1], at_T[:-1]\n"
        "KVCache.read = late",
        "model",
        "test_every_phase_is_the_references",
    ),
    "ids of candidates that forget whose block they are of": (
        "from mpishard.engine import sampling\n"
        "right = sampling.local_top_k_candidates\n"
        "sampling.local_top_k_candidates = lambda keys, n, first, mesh: right(keys, n, 0, mesh)",
        "sampling",
        "test_the_choice_is_that_of_the_whole_vocabulary",
    ),
    "partial attentions that count the same": (
        "import numpy as np\n"
        "from mpishard.parallel import flash_decoding\n"
        "flash_decoding.merge_weights = lambda lse: (np.full_like(lse, 1 / len(lse)), None)",
        "sublayers",
        "test_attention",
    ),
    "keys taken for those of other positions": (
        "import numpy as np\n"
        "from mpishard.parallel import flash_decoding\n"
        "right = flash_decoding.attend\n"
        "def wrong(q, q_pos, k, v, k_pos, spec):\n"
        "    return right(q, q_pos, k, v, np.arange(len(k_pos)) + len(k_pos), spec)\n"
        "flash_decoding.attend = wrong",
        "sublayers",
        "test_attention",
    ),
    "a ring that stands still": (
        "from mpishard.parallel import context\n"
        "right = context._needed_downstream\n"
        "def nothing(*args):\n"
        "    return [at_T[:0] for at_T in right(*args)]\n"
        "context._needed_downstream = nothing",
        "sublayers",
        "test_attention",
    ),
    "tokens left in the order of the ranks": (
        "from mpishard.communication.collectives import all_gather\n"
        "from mpishard.parallel import context\n"
        "context.gather_sequence = lambda x, places, mesh: all_gather(\n"
        "    x, mesh.cp, sizes=[len(place) for place in places]\n"
        ")",
        "sublayers",
        "test_attention",
    ),
    "blocks of tokens that change places": (
        "from mpishard.communication.collectives import reduce_scatter\n"
        "from mpishard.parallel import sequence\n"
        "sequence.reduce_scatter = lambda x, group: reduce_scatter(x[::-1], group)",
        "sublayers",
        "test_feed_forward",
    ),
    "replicas that talk": (
        "from mpishard.parallel import tensor\n"
        "right = tensor.all_reduce\n"
        "def chatty(x, group):\n"
        "    right(x, chatty.mesh.dp)\n"
        "    return right(x, group)\n"
        "from mpishard import model\n"
        "init = model.Decoder.__init__\n"
        "def keep(self, config, weights, mesh, *rest):\n"
        "    chatty.mesh = mesh\n"
        "    init(self, config, weights, mesh, *rest)\n"
        "model.Decoder.__init__ = keep\n"
        "tensor.all_reduce = chatty",
        "schedule",
        "test_replicas_never_meet",
    ),
    # Mistakes of single families' options.
    "norms that forget their offset": (
        "from dataclasses import replace\n"
        "from mpishard import layers\n"
        "right = layers.make_norm\n"
        "layers.make_norm = lambda config, *of: right(replace(config, norm_offset=0.0), *of)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "norms on the other side of their sub-layers": (
        "from dataclasses import replace\n"
        "from mpishard import model\n"
        "right = model.make_layer\n"
        "def wrong(*args):\n"
        "    layer = right(*args)\n"
        "    before, after = layer.attention_norm, layer.attention_post_norm\n"
        "    return replace(layer, attention_norm=after, attention_post_norm=before)\n"
        "model.make_layer = wrong",
        "model",
        "test_every_phase_is_the_references",
    ),
    "a factor of sub-layers that is forgotten": (
        "from mpishard import layers\n"
        "from mpishard.arithmetic.ops import identity\n"
        "layers.Multiplier = lambda factor: identity",
        "model",
        "test_every_phase_is_the_references",
    ),
    "layers without rope that are rotated": (
        "from mpishard.rope import RotaryEmbedding\n"
        "right = RotaryEmbedding.__call__\n"
        "RotaryEmbedding.__call__ = lambda self, step: [right(self, step)[0]] * len(self.ropes)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "a parallel residual without its feed-forward network": (
        "from dataclasses import replace\n"
        "from mpishard import layers\n"
        "right = layers._parallel_layer\n"
        "def wrong(*args):\n"
        "    layer = right(*args)\n"
        "    down = replace(layer.ffn.down, weight=0 * layer.ffn.down.weight)\n"
        "    return replace(layer, ffn=replace(layer.ffn, down=down))\n"
        "layers._parallel_layer = wrong",
        "model",
        "test_every_phase_is_the_references",
    ),
    "biases of a parallel residual that are added twice": (
        "from mpishard.arithmetic.linear import Linear\nLinear.partial = lambda self, x: self(x)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "positions off by one": (
        "from dataclasses import replace\n"
        "from mpishard import model\n"
        "right = model.make_embedding\n"
        "def wrong(*args):\n"
        "    embedding = right(*args)\n"
        "    return replace(embedding, position_offset=embedding.position_offset + 1)\n"
        "model.make_embedding = wrong",
        "model",
        "test_every_phase_is_the_references",
    ),
    "slopes of the heads of another rank": (
        "from mpishard import layers\n"
        "right = layers.query_heads_of\n"
        "layers.query_heads_of = lambda config, tp, rank: right(config, tp, tp - 1 - rank)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "norms that keep the mean": (
        "import numpy as np\n"
        "from mpishard.arithmetic import layer_norm\n"
        "from mpishard.arithmetic.ops import rms_norm\n"
        "layer_norm.standardize = lambda x, eps: rms_norm(x, np.ones(1), eps)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "pairs of halves where neighbours are rotated": (
        "from mpishard.parallel import qkv\n"
        "right = qkv.apply_rotary\n"
        "qkv.apply_rotary = lambda x, cos, sin, interleaved=False: right(x, cos, sin)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "short factors in long sequences": (
        "from mpishard.rope import RotaryEmbedding\n"
        "right = RotaryEmbedding._of_length\n"
        "RotaryEmbedding._of_length = lambda self, rope, length: right(self, rope, 0)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "norms before the rotation": (
        "from mpishard import layers\n"
        "right = layers.Attention\n"
        "layers.Attention = lambda **of: right(**of | {'norm_after_rope': False})",
        "model",
        "test_every_phase_is_the_references",
    ),
    "norms over the heads of one rank": (
        "from mpishard.parallel.qkv import FullWidthNorm\n"
        "right = FullWidthNorm.__call__\n"
        "FullWidthNorm.__call__ = lambda w, q, k, _: right(w, q, k, w.partial_squares(q, k))",
        "model",
        "test_every_phase_is_the_references",
    ),
    "windows in place of chunks": (
        "from mpishard.arithmetic import attention\n"
        "right = attention.first_visible\n"
        "attention.first_visible = lambda at_S, window, chunk: right(at_S, window or chunk, None)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "weights of the outputs of experts": (
        "from mpishard import layers\n"
        "right = layers.MoELayer\n"
        "layers.MoELayer = lambda **of: right(**of | {'scale_inputs': False})",
        "model",
        "test_every_phase_is_the_references",
    ),
    "sums without a lower bound": (
        "from dataclasses import replace\n"
        "from mpishard import layers\n"
        "right = layers.Router\n"
        "layers.Router = lambda *of: replace(right(*of), norm_min=0.0)",
        "model",
        "test_every_phase_is_the_references",
    ),
    "queries that do not grow with their position": (
        "from mpishard.rope import RotaryEmbedding\n"
        "RotaryEmbedding._query_scale = lambda self, rope, positions_N: None",
        "model",
        "test_every_phase_is_the_references",
    ),
}


# The plugin: each test that is to find mistakes, with each of them and with nothing at all.
PLUGIN = """
import json, os, sys
import pytest

MISTAKES = json.loads(os.environ["MISTAKES"])

def pytest_generate_tests(metafunc):
    test = metafunc.function.__name__
    names = [name for name, (_, victim, _) in MISTAKES.items() if victim in (None, test)]
    if len(names) > 1:
        metafunc.parametrize("mistake", names, indirect=True)

def pytest_collection_modifyitems(items):
    def is_meant(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        variant = MISTAKES[params["mistake"]][2] if "mistake" in params else None
        return variant and params.get("variant", variant) == variant
    items[:] = filter(is_meant, items)

@pytest.fixture(autouse=True)
def mistake(request):
    from mpishard.arithmetic.linear import Linear
    from mpishard.model import Decoder
    from mpishard.parallel.qkv import FullWidthNorm
    from mpishard.rope import RotaryEmbedding
    from mpishard.sequences.kv_cache import KVCache
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] in ("mpishard", "toys")]
    owners = [*modules, Decoder, FullWidthNorm, KVCache, Linear, RotaryEmbedding]
    before = [dict(vars(owner)) for owner in owners]
    exec(MISTAKES[request.param][0], {})
    forget(before)
    yield
    for owner, attributes in zip(owners, before):
        for name, value in attributes.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)
    forget(before)

def forget(owners):
    \"""Empty the caches of functions: they may have computed with another mistake.\"""
    for attributes in owners:
        for value in attributes.values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the short run says of all mistakes."""
    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "mistakes.py").write_text(PLUGIN)
    mistakes = {
        name: (patch, test, VARIANT_OF.get(name, USUAL))
        for name, (patch, _, test) in MISTAKES.items()
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *TESTS.values()]
        + ["-k", "np2"],
        cwd=ROOT,
        env=os.environ
        | {"PYTEST_PLUGINS": "mistakes", "PYTHONPATH": f"{plugins}:{ROOT / 'tests'}"}
        | {"MISTAKES": json.dumps(mistakes)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_turns_the_suite_red(mistake: str, said: str):
    _, file, victim = MISTAKES[mistake]
    where = rf"{TESTS[file]}::(\w+)\[.*{re.escape(mistake)}" if victim else r"\S+::(\w+)\[.*nothing"
    found = re.findall(rf"^(PASSED|FAILED|ERROR) {where}", said, re.M)
    assert found and ("ERROR" not in dict(found)), said
    failed = {test for result, test in found if result == "FAILED"}
    assert failed == ({victim} if victim else set()), said
