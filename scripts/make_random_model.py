#!/usr/bin/env python3
"""Write a Llama or Mixtral of random weights as a Hugging Face directory, to measure speed on.

    python scripts/make_random_model.py OUT [--layers 12 --hidden 1024 …]
    python scripts/make_random_model.py OUT --layers 8 --experts 16 --ffn 1024

Without options it has 207 million weights, 828 MB in float32; the mixture has 493 million, 1.97 GB,
of which 108 million work on a token. There is no tokenizer. The weights are drawn and written a few
megabytes at a time, so that memory does not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpishard.config.model_config import ModelConfig  # noqa: E402
from mpishard.config.reader import read_model_config  # noqa: E402
from mpishard.config.weight_specs import WeightSpec, weight_specs  # noqa: E402
from mpishard.errors import UserError  # noqa: E402

# How safetensors and config.json name the types of weights.
DTYPES = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float16": ("F16", np.float16),
}
STANDARD_DEVIATION = 0.02
BLOCK = 2**22  # elements drawn at a time


def main() -> int:
    args = _parse()
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "intermediate_size": args.ffn,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim or args.hidden // args.heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": args.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": args.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": args.dtype,
    }
    if args.experts:
        raw |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": args.experts,
            "num_experts_per_tok": args.top_k,
        }
    try:
        config = read_model_config(raw, None, "the options")
        args.out.mkdir(parents=True)
    except (UserError, FileExistsError) as error:
        print(f"make_random_model.py: error: {error}", file=sys.stderr)
        return 2
    (args.out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    size = write_weights(config, args.out / "model.safetensors", args.dtype, args.seed)
    print(f"{args.out}: {size / 1e6:.1f} MB")
    return 0


def write_weights(config: ModelConfig, path: Path, dtype: str, seed: int) -> int:
    """Write all weights of `config`: matrices normal, biases 0, norms 1; the bytes of the file."""
    name, number_type = DTYPES[dtype]
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weight_specs(config):
        start, end = end, end + math.prod(weight.shape) * np.dtype(number_type).itemsize
        header[weight.name] = {"dtype": name, "shape": weight.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the data is aligned
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for weight in weight_specs(config):
            for block in draw(weight, random):
                file.write(block.astype(number_type).tobytes())
        return file.tell()


def draw(weight: WeightSpec, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The elements of one weight in C order, in blocks."""
    size = math.prod(weight.shape)
    if len(weight.shape) == 1:
        yield np.full(size, "norm" in weight.field, np.float32)
        return
    for start in range(0, size, BLOCK):
        block = random.standard_normal(min(BLOCK, size - start), np.float32)
        yield block * np.float32(STANDARD_DEVIATION)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a Llama or Mixtral of random weights as a Hugging Face directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory; must not exist")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the residual stream")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers")
    parser.add_argument("--ffn", type=int, default=2816, help="feed-forward width")
    parser.add_argument("--experts", type=int, default=0, help="experts of that width; 0: none")
    parser.add_argument("--top-k", type=int, default=2, help="experts that a token goes to")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key/value heads")
    parser.add_argument("--head-dim", type=int, help="width of a head (hidden / heads)")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens of the vocabulary")
    parser.add_argument("--positions", type=int, default=4096, help="positions of the model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--tied", action="store_true", help="the embedding is also the head")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
