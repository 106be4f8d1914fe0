#!/usr/bin/env python3
"""Remake tests/golden: what Hugging Face transformers computes for the tiny models of the tests.

    python scripts/dev/make_goldens.py [VARIANT | repetition_penalty …]

Needs torch and transformers (the `dev` extra). For each variant and prompt P it stores, in float32:
ids_P (S,), logits_P (S, V) at every position, hidden_P (layers + 1, S, D): the residual stream
entering each layer and after the final norm, and greedy_P: the continuation, recomputed without a
cache, so that the rope types that depend on the length are well defined. For a mixture of experts
also experts_P (mixtures, S, A), ascending, and weights_P, as the router of each chose them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from stored import stored  # noqa: E402
from tiny_encoder_models import ENCODER_VARIANTS, encoder_prompts  # noqa: E402
from tiny_models import (  # noqa: E402
    MOE_VARIANTS,
    VARIANTS,
    raw_config,
    stacked_weights,
    tiny_config,
    tiny_prompts,
    tiny_weights,
    write_checkpoint,
)

from mpishard.reference import Reference  # noqa: E402

EVERY_VARIANT = VARIANTS | MOE_VARIANTS | ENCODER_VARIANTS
GOLDEN = ROOT / "tests" / "golden"
REPETITION_PENALTY = "repetition_penalty"
CONTINUATION = 8
LEAST_MARGIN = 2e-3  # of the logits' standard deviation, ten times the tolerance of the tests
LEAST_ROUTER_MARGIN = 2e-4  # of the scores, a hundred times what rounding does to them


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    GOLDEN.mkdir(exist_ok=True)
    for variant in [name for name in sys.argv[1:] if name in EVERY_VARIANT] or (
        [] if sys.argv[1:] else EVERY_VARIANT
    ):
        arrays = encoder_golden(variant) if variant in ENCODER_VARIANTS else golden(variant)
        np.savez_compressed(GOLDEN / f"{variant}.npz", **arrays)
        print(f"{variant}: least margin {arrays['margin']:.4f} of the logits' standard deviation")
    if not sys.argv[1:] or REPETITION_PENALTY in sys.argv[1:]:
        np.savez_compressed(GOLDEN / f"{REPETITION_PENALTY}.npz", **repetition_penalty())
    if not sys.argv[1:]:
        for file in GOLDEN.glob("*.npz"):
            if file.stem not in [*EVERY_VARIANT, REPETITION_PENALTY]:
                file.unlink()


# Families whose code transformers has not, and those of the same mathematics, whose files it reads.
SAME = {
    "internlm2": ("llama", "LlamaForCausalLM", {"bias": "attention_bias"}),
    "mimo": ("qwen2", "Qwen2ForCausalLM", {}),
}


def write(variant: str, directory: str) -> None:
    """Write `variant` as a checkpoint that transformers reads."""
    config = raw_config(variant)
    if config["model_type"] not in SAME:
        write_checkpoint(variant, directory)
        return
    family, architecture, fields = SAME[config["model_type"]]
    renamed = {fields.get(name, name): value for name, value in config.items()}
    renamed |= {"model_type": family, "architectures": [architecture]}
    Path(directory, "config.json").write_text(json.dumps(renamed))
    save_file(tiny_weights(variant), f"{directory}/model.safetensors", metadata={"format": "pt"})


def repetition_penalty() -> dict[str, Any]:
    """What transformers' RepetitionPenaltyLogitsProcessor makes of random logits (V,) after the
    tokens `ids`, for each `penalty`."""
    random = np.random.RandomState(5)
    logits = 4 * random.standard_normal((1, 301)).astype(np.float32)
    ids, penalties = random.randint(0, 301, 24), np.array([0.7, 1.1, 3.0])
    processed = [
        transformers.RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor(ids)[None], torch.tensor(logits)
        )[0].numpy()
        for penalty in penalties.tolist()
    ]
    return {
        "transformers": np.array(transformers.__version__),
        "ids": ids,
        "logits": logits,
        "penalty": penalties,
        "processed": np.stack(processed),
    }


def golden(variant: str) -> dict[str, Any]:
    """The arrays of one file; raises SystemExit if two tokens are too close to tell apart."""
    arrays: dict[str, Any] = {"transformers": np.array(transformers.__version__)}
    margins, sequences = [], []
    with tempfile.TemporaryDirectory() as directory:
        write(variant, directory)
        if variant in MOE_VARIANTS:
            check_stacked(variant, directory)
        for p, ids in enumerate(tiny_prompts(variant)):
            # Afresh for each prompt, because dynamic rope remembers the longest sequence it saw.
            model = load(directory)
            routed = watch_routers(model)
            logits, hidden = forward(model, ids)
            arrays |= {f"ids_{p}": np.array(ids), f"logits_{p}": logits, f"hidden_{p}": hidden}
            if routed:
                arrays[f"experts_{p}"] = np.stack([experts for experts, _ in routed])
                arrays[f"weights_{p}"] = np.stack([weights for _, weights in routed])
            sequence = list(ids)
            for _ in range(CONTINUATION):
                logits, _ = forward(model, sequence)
                second, first = np.sort(logits[-1])[-2:]
                margins.append((first - second) / logits.std())
                sequence.append(int(logits[-1].argmax()))
            arrays[f"greedy_{p}"] = np.array(sequence[len(ids) :])
            sequences.append(sequence)
    arrays["margin"] = np.array(min(margins))
    if min(margins) < LEAST_MARGIN:
        raise SystemExit(f"{variant}: two tokens are {min(margins):.1e} apart: take another seed")
    if variant in MOE_VARIANTS and router_margin(variant, sequences) < LEAST_ROUTER_MARGIN:
        raise SystemExit(f"{variant}: a router comes to a near-tie: take another seed")
    return arrays


@torch.no_grad()
def encoder_golden(variant: str) -> dict[str, Any]:
    """The same of a model with an encoder: encoder_ids_P is what this reads, ids_P what the decoder
    is given. Raises SystemExit as `golden` does."""
    arrays: dict[str, Any] = {"transformers": np.array(transformers.__version__)}
    margins, router_margins = [], []
    reference = Reference(tiny_config(variant), tiny_weights(variant))
    assert reference.encoder is not None
    with tempfile.TemporaryDirectory() as directory:
        write(variant, directory)
        model = load(directory)
    for p, (encoder_ids, ids) in enumerate(encoder_prompts(variant)):
        sequence = list(ids)
        for count in range(CONTINUATION + 1):
            output = model(
                input_ids=torch.tensor([encoder_ids]),
                decoder_input_ids=torch.tensor([sequence]),
                use_cache=False,
            )
            logits = output.logits[0].numpy()
            if count == 0:
                arrays |= {f"encoder_ids_{p}": np.array(encoder_ids), f"ids_{p}": np.array(ids)}
                arrays[f"logits_{p}"] = logits
            second, first = np.sort(logits[-1])[-2:]
            margins.append((first - second) / logits.std())
            sequence.append(int(logits[-1].argmax()))
        arrays[f"greedy_{p}"] = np.array(sequence[len(ids) : -1])
        routed = reference.routings(sequence, encoder_ids) | {
            -1 - layer: one for layer, one in reference.encoder.routings(encoder_ids).items()
        }
        router_margins += [one.margin_S.min() for one in routed.values()]
    arrays["margin"] = np.array(min(margins))
    if min(margins) < LEAST_MARGIN or min(router_margins) < LEAST_ROUTER_MARGIN:
        raise SystemExit(f"{variant}: a near-tie of tokens or experts: take another seed")
    return arrays


def check_stacked(variant: str, directory: str) -> None:
    """Raise SystemExit unless transformers stacks the experts as `stacked_weights` does. Granite's
    are stacked in every file, under other names than transformers has for them."""
    moe = tiny_config(variant).moe
    assert moe is not None
    names = moe.names
    if names.separate is None and not names.stacked.transposed:
        return
    with tempfile.TemporaryDirectory() as other:
        load(directory).save_pretrained(other, save_original_format=False)
        theirs = load_file(f"{other}/model.safetensors")
    ours = stored(tiny_config(variant), stacked_weights(variant))
    if theirs.keys() != ours.keys():
        raise SystemExit(f"{variant}: transformers has {sorted(theirs.keys() ^ ours.keys())}")
    differing = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    if differing:
        raise SystemExit(f"{variant}: transformers has other values in {differing}")


def watch_routers(model: transformers.PreTrainedModel) -> list[tuple[np.ndarray, np.ndarray]]:
    """A list to which the first forward pass of `model` adds the experts and weights (S, A) of each
    mixture, experts ascending."""
    routed: list[tuple[np.ndarray, np.ndarray]] = []
    handles: list[Any] = []

    def note(router: torch.nn.Module, arguments: Any, output: tuple[torch.Tensor, ...]) -> None:
        if len(output) == 2:  # Llama 4's: the weights of all experts, and their logits
            weights, experts = output[0].topk(router.top_k, dim=-1)
        else:
            _, weights, experts = output
        order = experts.argsort(dim=-1)
        routed.append((experts.gather(-1, order).numpy(), weights.gather(-1, order).numpy()))
        handles.pop(0).remove()

    for module in model.modules():
        if type(module).__name__.lower().endswith(("topkrouter", "moev1gate", "llama4router")):
            handles.append(module.register_forward_hook(note))
    return routed


def router_margin(variant: str, sequences: list[list[int]]) -> float:
    """The least margin of any choice of experts. It only decides about the seed, so that our own
    oracle may say it."""
    model = Reference(tiny_config(variant), tiny_weights(variant))
    found = [model.routings(sequence) for sequence in sequences]
    margins = [routing.margin_S.min() for routings in found for routing in routings.values()]
    return min(margins, default=np.inf)


def load(directory: str) -> transformers.PreTrainedModel:
    """The model, which must have found each of its weights in the checkpoint and left none."""
    config = transformers.AutoConfig.from_pretrained(directory)
    # Falcon's eager attention adds its biases twice.
    is_biased_twice = config.model_type == "falcon" and config.alibi
    is_decoder = not config.is_encoder_decoder
    auto = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModelForSeq2SeqLM
    model, report = auto.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="sdpa" if is_biased_twice else "eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    wrong = {what: names for what, names in report.items() if names}
    if wrong:
        raise SystemExit(f"{directory}: transformers reports {wrong}")
    return model.eval()


@torch.no_grad()
def forward(model: transformers.PreTrainedModel, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (S, V) and hidden states (layers + 1, S, D) of one sequence."""
    output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return output.logits[0].numpy(), torch.cat(output.hidden_states).numpy()


if __name__ == "__main__":
    main()
