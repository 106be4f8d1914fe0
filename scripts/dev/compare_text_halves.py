#!/usr/bin/env python3
"""Compare the text half of tiny multimodal models with transformers.

    python scripts/dev/compare_text_halves.py [MODEL_TYPE …]

Needs torch and transformers (the `dev` extra). transformers makes a random model of each type and
writes it. The logits of the reference for that directory must be those of the model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mpishard.reference import Reference  # noqa: E402
from mpishard.storage.checkpoint import Checkpoint  # noqa: E402
from mpishard.storage.text_half import text_half  # noqa: E402

TOLERANCE = 2e-4  # of the logits' standard deviation
IDS = [5, 9, 1, 44, 80, 3, 2, 61, 7, 30, 12]

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
CHUNKS = {
    "head_dim": 8,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 4,
    "no_rope_layers": [1, 0, 1],
    "floor_scale": 4,
}


def mrope(theta: float, *sections: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": list(sections), "rope_theta": theta}
    return {"rope_parameters": rope}


TOWER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20, "patch_size": 4}
CLIP = TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": 16}
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
PIXTRAL = CLIP | {"model_type": "pixtral", "head_dim": 8}
INTERN = TOWER | {"num_hidden_layers": 1, "patch_size": [4, 4], "image_size": [16, 16]}
KIMI = TOWER | {"num_hidden_layers": 1, "pos_emb_height": 4, "pos_emb_width": 4}
LLAMA4 = TOWER | {"num_hidden_layers": 1, "intermediate_size": 64, "image_size": 16}
LLAMA4 |= {name: 16 for name in ("vision_output_dim", "projector_input_dim")}
LLAMA4 |= {"projector_output_dim": 16}
QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 20}
QWEN |= {"out_hidden_size": 32}

# The language model, and the tower.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": ({"model_type": "llama"}, CLIP),
    "llava_next": ({"model_type": "mistral"}, CLIP),
    "internvl": ({"model_type": "qwen3", "head_dim": 12}, INTERN),
    "mistral3": ({"model_type": "mistral", "head_dim": 10}, PIXTRAL),
    "qwen2_vl": (mrope(1e6, 2, 1, 1), {"depth": 1, "embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": (mrope(1e6, 2, 1, 1), QWEN | {"fullatt_block_indexes": [0]}),
    "qwen3_vl": (mrope(5e5, 2, 2, 2) | {"head_dim": 12}, QWEN | {"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": (
        mrope(5e5, 2, 2, 2) | EXPERTS | {"head_dim": 12},
        QWEN | {"deepstack_visual_indexes": [0]},
    ),
    "kimi_k25": ({"model_type": "deepseek_v3"} | DEEPSEEK, KIMI),
    "gemma3": ({"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 12}, SIGLIP),
    "llama4": (CHUNKS, LLAMA4),
}


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    differing = 0
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as place:
            right_SV = write_model(name, Path(place))
            checkpoint = Checkpoint.open(place)
            weights = {
                weight: checkpoint.read(weight, (slice(None),) * len(checkpoint.shape(weight)))
                for weight in checkpoint.locations
            }
            stored, _ = text_half(load_file(Path(place) / "model.safetensors"))  # stacked experts
            logits_SV, _ = Reference(checkpoint.config, stored | weights).forward(IDS)
            error = abs(logits_SV - right_SV).max() / right_SV.std()
        differing += error > TOLERANCE
        print(f"{name}: {checkpoint.config.family}, {error:.1e} of the standard deviation")
    sys.exit(1 if differing else 0)


def write_model(name: str, directory: Path) -> np.ndarray:
    """Writes a random model of this type; its logits."""
    text, tower = MODELS[name]
    torch.manual_seed(3)
    config = CONFIG_MAPPING[name](text_config=TEXT | text, vision_config=tower)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
        # llama4's own forward wants images.
        whole = model.language_model if name == "llama4" else model
        logits = whole(input_ids=torch.tensor([IDS])).logits[0].numpy()
    model.save_pretrained(directory)
    if name == "kimi_k25":  # transformers 5.24 writes layers under the name of the tower's blocks
        path = directory / "model.safetensors"
        tensors = load_file(path)
        save_file(
            {k.replace("model.blocks.", "model.layers."): v for k, v in tensors.items()}, path
        )
    return logits


if __name__ == "__main__":
    main()
