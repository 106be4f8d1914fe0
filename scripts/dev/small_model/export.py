"""What comes out: the model directory, its losses and samples of its text."""

from __future__ import annotations

import json
import math
import platform
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from small_model.corpus import END_ID, END_OF_TEXT, KINDS, LIBRARY, Tokens
from small_model.network import Decoder, MixtureShape, Shape
from small_model.training import Progress, imbalance

# A user's message becomes a heading of the language reference, which the model then writes out.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- message['content'] + '\\n' + '*' * message['content'] | length + '\\n\\n' -}}
{%- else -%}
{{- message['content'] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

PROMPTS = (
    "Send a message to the server",
    "When an exception",
    "If no exception occurs",
    "class Queue:",
    "def read(self, size=-1):",
    "import os\nimport sys\n\ndef main(",
)


@torch.no_grad()
def held_out_losses(model: Decoder, tokens: Tokens, length: int = 512) -> dict[str, dict]:
    """Nats per token and bits per byte on the held-out documents, by kind and over all."""
    sums = {kind: [0.0, 0, 0] for kind in (*KINDS, "all")}
    for kind, ids, size in tokens.held_out:
        ids = torch.cat((torch.tensor([END_ID]), ids))
        pieces = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
        nats = sum(model.loss(piece[None], "sum").item() for piece in pieces)
        for key in (kind, "all"):
            sums[key] = [a + b for a, b in zip(sums[key], (nats, len(ids) - 1, size), strict=True)]
    return {
        kind: {
            "tokens": count,
            "nats_per_token": round(nats / count, 4),
            "bits_per_byte": round(nats / math.log(2) / size, 4),
        }
        for kind, (nats, count, size) in sums.items()
        if count
    }


@torch.no_grad()
def continuation(
    model: Decoder, tokenizer: Tokenizer, prompt: str, count: int, temperature: float = 0.0
) -> str:
    """The `count` tokens that follow a prompt, greedily or sampled."""
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    while len(ids) < start + count:
        logits = model(torch.tensor([ids]))[0, -1]
        if temperature:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1))
        else:
            token = int(logits.argmax())
        if token == END_ID:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def print_samples(model: Decoder, tokenizer: Tokenizer, seed: int) -> None:
    torch.manual_seed(seed)
    for prompt in PROMPTS:
        for name, temperature in (("greedy", 0.0), ("sampled at 0.5", 0.5)):
            text = continuation(model, tokenizer, prompt, 64, temperature)
            print(f"--- {name}\n{prompt}[…]{text}\n")


def config(shape: Shape) -> dict:
    mixture = isinstance(shape, MixtureShape)
    llama = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    mixtral = {"sliding_window": None, "router_jitter_noise": 0.0, "output_router_logits": False}
    return {
        "architectures": ["MixtralForCausalLM" if mixture else "LlamaForCausalLM"],
        "model_type": "mixtral" if mixture else "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **(mixtral if mixture else llama),
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
    }


def export(
    model: Decoder, tokenizer: Tokenizer, tokens: Tokens, progress: Progress, directory: Path
) -> None:
    """Round the weights to bfloat16, measure them as they then are, and write the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{k}": v.bfloat16().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in weights.items()})
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copyfile(LIBRARY / "LICENSE.txt", directory / "LICENSE.txt")  # of the corpus
    write_json(directory / "config.json", config(model.shape))
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": model.shape.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(
        directory / "generation_config.json", {"bos_token_id": END_ID, "eos_token_id": END_ID}
    )
    write_json(directory / "training.json", report(model, tokens, progress))


def report(model: Decoder, tokens: Tokens, progress: Progress) -> dict:
    sizes = {kind: sum(len(t) for k, t in tokens.training if k == kind) for kind in KINDS}
    model.take_load()
    held_out = held_out_losses(model, tokens)
    load = [{"rows": rows, "imbalance": imbalance(rows)} for rows in model.take_load()]
    return {
        "parameters": sum(w.numel() for w in model.parameters()),
        "corpus": f"standard library of CPython {platform.python_version()}",
        "corpus_tokens": sizes,
        **({"start": progress.start} if progress.start else {}),
        "steps": progress.step,
        "trained_tokens": progress.tokens,
        "minutes": round(progress.seconds / 60, 1),
        "training_loss": round(progress.loss, 4),
        "held_out": held_out,
        **({"held_out_expert_load": load} if load else {}),
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
