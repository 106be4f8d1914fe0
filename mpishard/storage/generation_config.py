"""The sampling defaults of a model: ``generation_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpishard.config.fields import Fields
from mpishard.storage.model_dir import GENERATION_CONFIG, read_json

# Fields of transformers that choose other tokens and are not built, and the values that do not.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "watermarking_config": (),
}


def read_sampling_defaults(path: Path) -> dict[str, Any]:
    """The fields of `mpishard.SamplingParams` that a ``generation_config.json`` has: those that
    vLLM takes from it. `path` is that file or its directory. ``do_sample`` false is greedy; true
    without a temperature is one of 1.

    Raises UserError if it cannot be read, has values of other types, or asks for what is not built.
    """
    path = path / GENERATION_CONFIG if path.is_dir() else path
    fields = Fields(read_json(path), str(path))
    for name, harmless in NOT_BUILT.items():
        if fields.get(name) not in (None, *harmless):
            fields.refuse(name, "chooses tokens in a way that is not built: remove it, or leave "
                                "--generation-config out")  # fmt: skip
    defaults: dict[str, Any] = {
        name: fields.optional_number(name)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
    }
    top_k = fields.get("top_k")
    if top_k is not None and (type(top_k) is not int or top_k < -1):
        fields.refuse("top_k", "must be a whole number, 0 or -1 for none")
    defaults["top_k"] = top_k
    defaults["max_tokens"] = fields.optional_integer("max_new_tokens")
    if fields.get("do_sample") is not None:
        samples = fields.flag("do_sample", False)
        defaults["temperature"] = (defaults["temperature"] or 1.0) if samples else 0.0
    return {name: value for name, value in defaults.items() if value is not None}
