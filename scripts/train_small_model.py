"""Train the small dense model of data/cpython-4m on the text that ships with CPython.

The corpus is the standard library of the interpreter that runs this script, so nothing is
downloaded: the language reference kept in ``pydoc_data.topics``, the docstrings of built-in
and library modules, and the library's source. The script trains a byte-level BPE on it, then a
Llama-style decoder (Muon for the matrices, AdamW for the rest), and writes the result in the
Hugging Face layout, in bfloat16.

    python scripts/train_small_model.py --minutes 60          # train, then write data/cpython-4m
    python scripts/train_small_model.py --minutes 60 --resume # go on from the last checkpoint
    python scripts/train_small_model.py --export-only         # write what the checkpoint holds

Needs torch, tokenizers and safetensors; a laptop's CPU is enough.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import math
import platform
import random
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END_OF_TEXT = "<|endoftext|>"
END_ID = 0
LIBRARY = Path(sysconfig.get_path("stdlib"))

# How often an epoch shows the documents of each kind: prose counts more than code.
KINDS = {"topic": 6, "docstrings": 2, "source": 1}

# Tests, tables, platform glue and bulky libraries that teach neither Python nor English.
SKIPPED_PARTS = {
    "__phello__", "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test",
    "idlelib", "lib2to3", "msilib", "pydoc_data", "site-packages", "test", "tests", "tkinter",
    "turtledemo",
}  # fmt: skip
SKIPPED_FILES = {
    "_pydecimal.py", "_strptime.py", "antigravity.py", "entities.py", "locale.py", "stringprep.py",
    "this.py", "turtle.py",
}  # fmt: skip

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


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, under the names of config.json."""

    vocab_size: int = 4000
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    name: str
    kind: str
    text: str

    @property
    def held_out(self) -> bool:
        """Two in a hundred modules and topics, whatever the kind, are never trained on."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < 2


# --- corpus ---------------------------------------------------------------------------------


def topic_documents() -> Iterator[Document]:
    """The language reference, without the topics that only repeat shorter ones."""
    seen: set[str] = set()
    for name, text in sorted(topics.topics.items(), key=lambda item: (len(item[1]), item[0])):
        paragraphs = text.strip().split("\n\n")
        known = sum(len(p) for p in paragraphs if p in seen)
        seen.update(paragraphs)
        if known < len(text) / 2:
            yield Document(f"topic:{name}", "topic", text.strip() + "\n")


def source_files() -> Iterator[tuple[str, str]]:
    """Name and text of the library modules worth reading."""
    for path in sorted(LIBRARY.rglob("*.py")):
        part = path.relative_to(LIBRARY)
        generated = path.name.startswith("_sysconfigdata") or "config-" in part.parts[0]
        if SKIPPED_PARTS & set(part.parts) or path.name in SKIPPED_FILES or generated:
            continue
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            yield part.as_posix(), text + "\n"


def quoted(doc: str, indent: int) -> str:
    """A docstring as it stands in source, `indent` columns deep."""
    lines = inspect.cleandoc(doc).replace("\\", "\\\\").splitlines()
    text = "\n".join(" " * indent + line if line else "" for line in lines)
    end = "\n" + " " * indent if len(lines) > 1 else ""
    return " " * indent + '"""' + text.lstrip() + end + '"""\n'


def signatures_and_docstrings(tree: ast.Module) -> str:
    """What is left of a module without the code: its docstrings under their signatures."""
    parts = [quoted(ast.get_docstring(tree) or "", 0)] if ast.get_docstring(tree) else []

    def visit(node: ast.AST, indent: int) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if doc := ast.get_docstring(child):
                parts.append(" " * indent + heading(child) + "\n" + quoted(doc, indent + 4))
            if isinstance(child, ast.ClassDef):
                visit(child, indent + 4)

    visit(tree, 0)
    return "\n".join(parts)


def heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The first line of a class or function, without decorators and annotations of results."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{word} {node.name}({ast.unparse(node.args)}):"


def builtin_docstrings(module_name: str) -> str:
    """Signatures and docstrings of a module that is written in C."""
    module = importlib.import_module(module_name)
    parts, seen = [quoted(module.__doc__, 0)] if module.__doc__ else [], set()

    def visit(owner: object, indent: int) -> None:
        for name, value in sorted(vars(owner).items()):
            doc, is_class = getattr(value, "__doc__", None), inspect.isclass(value)
            if not isinstance(doc, str) or doc in seen or not (callable(value) or is_class):
                continue
            seen.add(doc)
            signature = getattr(value, "__text_signature__", None) or "(...)"
            first = f"class {name}:" if is_class else f"def {name}{signature}:"
            first = first.replace("$self", "self").replace("$module, ", "").replace("$module", "")
            parts.append(" " * indent + first + "\n" + quoted(doc, indent + 4))
            if is_class and indent == 0:
                visit(value, 4)

    visit(module, 0)
    return "\n".join(parts)


def corpus() -> list[Document]:
    """All documents, in a fixed order."""
    documents = list(topic_documents())
    for name, text in source_files():
        documents.append(Document(name, "source", text))
        docstrings = signatures_and_docstrings(ast.parse(text))
        if len(docstrings) > 200:
            documents.append(Document(name, "docstrings", docstrings))
    for name in sorted(sys.builtin_module_names):
        docstrings = builtin_docstrings(name)
        if len(docstrings) > 200:
            documents.append(Document(f"builtin:{name}", "docstrings", docstrings))
    return documents


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE that splits words as GPT-2 does and adds nothing to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [d.text for d in documents if not d.held_out for _ in range(KINDS[d.kind])]
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_ID
    return tokenizer


@dataclass(frozen=True)
class Tokens:
    """The corpus as token ids: training documents by kind, held-out documents with byte counts."""

    training: list[tuple[str, Tensor]]
    held_out: list[tuple[str, Tensor, int]]

    @classmethod
    def encode(cls, documents: list[Document], tokenizer: Tokenizer) -> Tokens:
        training, held_out = [], []
        for document in documents:
            ids = torch.tensor([*tokenizer.encode(document.text).ids, END_ID])
            if document.held_out:
                held_out.append((document.kind, ids, len(document.text.encode())))
            else:
                training.append((document.kind, ids))
        return cls(training, held_out)

    def epoch(self, rng: random.Random, times: dict[str, int]) -> Tensor:
        """All training documents in a new order, each as often as its kind asks for."""
        texts = [ids for kind, ids in self.training for _ in range(times[kind])]
        rng.shuffle(texts)
        return torch.cat(texts)

    def batches(self, tokens_per_step: int, seed: int, times: dict[str, int]) -> Iterator[Tensor]:
        """Endless batches [rows, length + 1]; most rows are short, some fill the whole context."""
        rng = random.Random(seed)
        stream, at = self.epoch(rng, times), 0
        while True:
            length = rng.choices((256, 512, 1024, 2048), (56, 30, 9, 5))[0]
            rows = max(1, tokens_per_step // length)
            if at + rows * length + 1 > len(stream):
                stream, at = torch.cat((stream[at:], self.epoch(rng, times))), 0
            window = stream[at : at + rows * length + 1]
            yield torch.stack([window[r * length : (r + 1) * length + 1] for r in range(rows)])
            at += rows * length


# --- model ----------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on the halves of each head, the Llama way."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query_width = shape.num_attention_heads * shape.head_dim
        key_width = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.shape.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder whose parameters carry the names of the checkpoint, less the prefix ``model.``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape)
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(torch.arange(shape.max_position_embeddings), shape.rope_theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)  # every layer starts as the identity
            elif "embed" in name:
                nn.init.normal_(weight, std=0.02)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, batch: Tensor, reduction: str = "mean") -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


# --- optimisation ---------------------------------------------------------------------------


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Singular values of a stack of matrices brought near 1 by a Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; matrices of one shape are updated together."""

    def __init__(
        self,
        matrices: list[Tensor],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shapes = {m.shape for m in matrices}
        groups = [{"params": [m for m in matrices if m.shape == s]} for s in sorted(shapes)]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            updates = []
            for weight in group["params"]:
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                buffer = state["momentum"]
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                updates.append(weight.grad.lerp(buffer, group["momentum"]))
            scale = max(1.0, updates[0].shape[0] / updates[0].shape[1]) ** 0.5
            directions = orthogonalised(torch.stack(updates).to(self.dtype)).float()
            for weight, direction in zip(group["params"], directions, strict=True):
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(direction, alpha=-group["lr"] * scale)


def optimisers(model: Llama, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [w for w in model.layers.parameters() if w.ndim == 2]
    others = [w for w in model.parameters() if all(w is not m for m in matrices)]
    adam = torch.optim.AdamW(others, args.lr_adam, (0.9, 0.98), weight_decay=0.0, eps=1e-10)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    found = [Muon(matrices, args.lr, decay=args.decay, dtype=dtype), adam]
    for optimiser in found:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return found


def schedule(progress: float, warmup: float = 0.01, hold: float = 0.4) -> float:
    """Share of the peak learning rate: a short warm-up, a plateau, a straight line to zero."""
    return min(1.0, progress / warmup + 0.02, max(0.0, (1 - progress) / (1 - hold)))


@dataclass
class Progress:
    """How far training has come; kept in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # running mean over about a hundred steps

    def done(self, args: argparse.Namespace) -> float:
        return self.step / args.steps if args.steps else self.seconds / (60 * args.minutes)

    def record(self, loss: float, tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.loss += (loss - self.loss) * max(0.01, 1 / self.step)


def train_step(
    model: Llama, optimisers: list[torch.optim.Optimizer], batch: Tensor, factor: float, bf16: bool
) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


def train(model: Llama, tokens: Tokens, args: argparse.Namespace) -> Progress:
    """Train until the budget of minutes, or of steps, is used up."""
    progress, found, saved = Progress(), optimisers(model, args), time.perf_counter()
    if args.resume:
        progress = load_checkpoint(args.work, model, found)
    times = dict(zip(KINDS, args.mix, strict=True))
    batches = tokens.batches(args.batch, args.seed + progress.step, times)
    while progress.done(args) < 1:
        start, batch = time.perf_counter(), next(batches)
        loss = train_step(model, found, batch, schedule(progress.done(args)), args.bf16)
        end = time.perf_counter()
        progress.record(loss, batch[:, 1:].numel(), end - start)
        if progress.step % args.report == 0:
            rate = batch[:, 1:].numel() / (end - start)
            print(
                f"step {progress.step:6d}  {progress.seconds / 60:5.1f} min  "
                f"{progress.tokens / 1e6:6.2f} M tokens  loss {progress.loss:.3f}  "
                f"{rate:6.0f} tokens/s",
                flush=True,
            )
        if end - saved > 60 * args.save_minutes:
            save_checkpoint(args.work, model, found, progress)
            saved = end
    save_checkpoint(args.work, model, found, progress)
    return progress


def save_checkpoint(
    work: Path, model: Llama, optimisers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    state = {
        "shape": asdict(model.shape),
        "model": model.state_dict(),
        "optimisers": [o.state_dict() for o in optimisers],
        "progress": asdict(progress),
    }
    torch.save(state, work / "checkpoint.new")
    (work / "checkpoint.new").replace(work / "checkpoint.pt")


def load_checkpoint(
    work: Path, model: Llama, optimisers: list[torch.optim.Optimizer] | None = None
) -> Progress:
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    if optimisers:
        for optimiser, values in zip(optimisers, state["optimisers"], strict=True):
            rates = optimiser.state_dict()["param_groups"]  # of this run's command line
            optimiser.load_state_dict({**values, "param_groups": rates})
    return Progress(**state["progress"])


# --- what comes out -------------------------------------------------------------------------


@torch.no_grad()
def held_out_losses(model: Llama, tokens: Tokens, length: int = 512) -> dict[str, dict]:
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
    model: Llama, tokenizer: Tokenizer, prompt: str, count: int, temperature: float = 0.0
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


def print_samples(model: Llama, tokenizer: Tokenizer, seed: int) -> None:
    torch.manual_seed(seed)
    for prompt in PROMPTS:
        for name, temperature in (("greedy", 0.0), ("sampled at 0.5", 0.5)):
            text = continuation(model, tokenizer, prompt, 64, temperature)
            print(f"--- {name}\n{prompt}[…]{text}\n")


def config(shape: Shape) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
    }


def export(
    model: Llama, tokenizer: Tokenizer, tokens: Tokens, progress: Progress, directory: Path
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


def report(model: Llama, tokens: Tokens, progress: Progress) -> dict:
    sizes = {kind: sum(len(t) for k, t in tokens.training if k == kind) for kind in KINDS}
    return {
        "parameters": sum(w.numel() for w in model.parameters()),
        "corpus": f"standard library of CPython {platform.python_version()}",
        "corpus_tokens": sizes,
        "steps": progress.step,
        "trained_tokens": progress.tokens,
        "minutes": round(progress.seconds / 60, 1),
        "training_loss": round(progress.loss, 4),
        "held_out": held_out_losses(model, tokens),
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# --- command line ---------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the small dense model of data/.")
    work = Path(tempfile.gettempdir()) / "mpishard-small-model"
    data = Path(__file__).resolve().parent.parent / "data" / "cpython-4m"
    add = parser.add_argument
    add("--out", type=Path, default=data, help="directory to write (default: data/cpython-4m)")
    add("--work", type=Path, default=work, help="directory of checkpoints (default: %(default)s)")
    add("--minutes", type=float, default=60, help="time to train (default: %(default)s)")
    add("--steps", type=int, help="steps to train, instead of --minutes")
    add("--batch", type=int, default=4096, help="tokens per step (default: %(default)s)")
    add("--lr", type=float, default=0.008, help="peak rate of Muon (default: %(default)s)")
    add("--lr-adam", type=float, default=0.002, help="peak rate of AdamW (default: %(default)s)")
    add("--decay", type=float, default=0.05, help="weight decay of Muon (default: %(default)s)")
    add("--mix", type=int, nargs=3, default=[*KINDS.values()], metavar=("TOPICS", "DOCS", "SOURCE"),
        help="times an epoch shows each kind of text (default: 6 2 1)")  # fmt: skip
    add("--threads", type=int, help="threads of torch (default: torch decides)")
    add("--bf16", action="store_true", help="multiply in bfloat16 while training")
    add("--seed", type=int, default=0, help="seed of weights, order and samples")
    add("--report", type=int, default=50, help="steps between two lines of progress")
    add("--save-minutes", type=float, default=3, help="minutes between two checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--export-only", action="store_true", help="write what the checkpoint holds, train nothing")
    add("--no-export", action="store_true", help="only leave a checkpoint")
    return parser.parse_args()


def print_sizes(documents: list[Document], tokens: Tokens, model: Llama) -> None:
    for kind in KINDS:
        texts = [d.text for d in documents if d.kind == kind]
        count = sum(len(ids) for k, ids in tokens.training if k == kind)
        megabytes = sum(len(text) for text in texts) / 1e6
        print(f"{kind}: {len(texts)} texts, {megabytes:.2f} MB, {count} training tokens")
    print(f"{sum(w.numel() for w in model.parameters())} parameters", flush=True)


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, documents = Shape(), corpus()
    if args.resume or args.export_only:
        tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(documents, shape.vocab_size)
        tokenizer.save(str(args.work / "tokenizer.json"))
    tokens, model = Tokens.encode(documents, tokenizer), Llama(shape)
    print_sizes(documents, tokens, model)
    progress = load_checkpoint(args.work, model) if args.export_only else train(model, tokens, args)
    if not args.no_export:
        export(model, tokenizer, tokens, progress, args.out)
        print((args.out / "training.json").read_text())
        print_samples(model, tokenizer, args.seed)


if __name__ == "__main__":
    main()
