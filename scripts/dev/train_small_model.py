"""Train the small models of data/, dense or with experts, on the text that ships with CPython.

The corpus is the standard library of the interpreter that runs this script, so nothing is
downloaded: the language reference kept in ``pydoc_data.topics``, the docstrings of built-in
and library modules, and the library's source. The script trains a byte-level BPE on it, then a
Llama-style decoder, or with --experts a Mixtral-style one (Muon for the matrices, AdamW for the
rest), and writes the result in the Hugging Face layout, in bfloat16.

    python scripts/dev/train_small_model.py --minutes 60         # train, then write data/cpython-4m
    python scripts/dev/train_small_model.py --minutes 60 --resume # go on from the last checkpoint
    python scripts/dev/train_small_model.py --export-only         # write what the checkpoint holds
    python scripts/dev/train_small_model.py --experts 8 --top-k 2 # the same for data/cpython-moe-7m

With --start data/cpython-4m, experts begin as parts of that dense model, which takes a fraction of
the time.

Time is that of the processor, so a run that is stopped and continued loses none of it. SIGUSR1
ends the plateau of the learning rate: the decay begins, and the run ends, earlier.

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
import signal
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
from safetensors.torch import load_file, save_file
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
class MixtureShape(Shape):
    """Sizes of a model whose feed-forward layers are experts of `intermediate_size` each."""

    intermediate_size: int = 160
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01


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


class Expert(nn.Module):
    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.w2 = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)
        self.w3 = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Experts of which each token takes the most probable few; every choice is served.

    After a call, `balance` holds the load-balancing loss of Switch Transformers (1 when all
    experts are used alike), and `load` [experts] has grown by the rows each expert was given.
    """

    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.top_k = shape.num_experts_per_tok
        self.gate = nn.Linear(shape.hidden_size, shape.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(shape) for _ in range(shape.num_local_experts))
        self.register_buffer(
            "load", torch.zeros(shape.num_local_experts, dtype=torch.long), persistent=False
        )
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.route(rows)
        order = chosen.flatten().argsort(stable=True)  # the rows of one expert side by side
        token = order // self.top_k
        counts = chosen.flatten().bincount(minlength=len(self.experts))
        self.load += counts
        parts = rows.index_select(0, token).split(counts.tolist())
        results = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        weighted = torch.cat(results) * weights.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(rows).index_add(0, token, weighted).view_as(x)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [rows, top_k] of the chosen experts; always in float32, as Mixtral."""
        with torch.autocast("cpu", enabled=False):
            shares = torch.softmax(self.gate(rows.float()), -1)
        weights, chosen = shares.topk(self.top_k)
        used = chosen.flatten().bincount(minlength=len(self.experts)) / chosen.numel()
        self.balance = len(self.experts) * (used * shares.mean(0)).sum()
        return weights / weights.sum(-1, keepdim=True), chosen


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        if isinstance(shape, MixtureShape):
            self.block_sparse_moe = Mixture(shape)
        else:
            self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        feed_forward = self.block_sparse_moe if "block_sparse_moe" in self._modules else self.mlp
        return x + feed_forward(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Llama or Mixtral: parameters carry the checkpoint's names, less the prefix ``model.``."""

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
            if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
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

    def mixtures(self) -> list[Mixture]:
        return [module for module in self.modules() if isinstance(module, Mixture)]

    def balance_loss(self) -> Tensor | float:
        """The load-balancing losses of the last call, weighted and summed over the layers."""
        if not isinstance(self.shape, MixtureShape):
            return 0.0
        losses = torch.stack([mixture.balance for mixture in self.mixtures()])
        return self.shape.router_aux_loss_coef * losses.sum()

    def take_load(self) -> list[list[int]]:
        """Rows each expert of each layer was given since this was last asked; none if dense."""
        loads = [mixture.load.tolist() for mixture in self.mixtures()]
        for mixture in self.mixtures():
            mixture.load.zero_()
        return loads


@torch.no_grad()
def upcycle(model: Decoder, directory: Path) -> None:
    """Start a mixture from a trained dense model: sparse upcycling, arXiv 2212.05055.

    What both have is copied. An expert is narrower than the dense layer, so each is dealt some of
    its neurons, as from a shuffled pack of cards, and another such pack when one is used up. The
    weights of a token's experts sum to 1; `top_k` makes up for that.
    """
    weights = load_file(directory / "model.safetensors")
    dense = {name.removeprefix("model."): weight.float() for name, weight in weights.items()}
    model.load_state_dict(dense, strict=False)
    for number, mixture in enumerate(model.mixtures()):
        names = (f"layers.{number}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        gate, up, down = (dense[name] for name in names)
        width = model.shape.intermediate_size
        packs = math.ceil(len(mixture.experts) * width / len(gate))
        deals = torch.cat([torch.randperm(len(gate)) for _ in range(packs)]).split(width)
        for expert, neurons in zip(mixture.experts, deals, strict=False):
            expert.w1.weight.copy_(gate[neurons])
            expert.w3.weight.copy_(up[neurons])
            expert.w2.weight.copy_(mixture.top_k * down[:, neurons])


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


def optimisers(model: Decoder, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    named = model.layers.named_parameters()
    matrices = [w for name, w in named if w.ndim == 2 and not name.endswith(".gate.weight")]
    others = [w for w in model.parameters() if all(w is not m for m in matrices)]
    adam = torch.optim.AdamW(others, args.lr_adam, (0.9, 0.98), weight_decay=0.0, eps=1e-10)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    found = [Muon(matrices, args.lr, decay=args.decay, dtype=dtype), adam]
    for optimiser in found:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return found


def schedule(progress: float, hold: float, warmup: float = 0.01) -> float:
    """Share of the peak learning rate: a short warm-up, a plateau, a straight line to zero."""
    return min(1.0, progress / warmup + 0.02, max(0.0, (1 - progress) / (1 - hold)))


def end_plateau(progress: Progress, args: argparse.Namespace) -> None:
    """Shrink the budget to that of which what is used up is the plateau, if that is less."""
    if progress.done(args) < args.hold:
        args.steps = math.ceil(progress.step / args.hold)
        print(f"decay from step {progress.step}, to end at step {args.steps}", flush=True)


@dataclass
class Progress:
    """How far training has come; kept in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # running mean over about a hundred steps
    start: str = ""  # the dense model that a mixture was made from

    def done(self, args: argparse.Namespace) -> float:
        return self.step / args.steps if args.steps else self.seconds / (60 * args.minutes)

    def record(self, loss: float, tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.loss += (loss - self.loss) * max(0.01, 1 / self.step)


def train_step(
    model: Decoder,
    optimisers: list[torch.optim.Optimizer],
    batch: Tensor,
    factor: float,
    bf16: bool,
) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(batch)
    (loss + model.balance_loss()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


def train(model: Decoder, tokens: Tokens, args: argparse.Namespace) -> Progress:
    """Train until the budget of minutes, or of steps, is used up."""
    progress = Progress(start=args.start.name if args.start else "")
    found, saved = optimisers(model, args), time.monotonic()
    if args.resume:
        progress = load_checkpoint(args.work, model, found)
    signal.signal(signal.SIGUSR1, lambda *_: end_plateau(progress, args))
    times = dict(zip(KINDS, args.mix, strict=True))
    batches = tokens.batches(args.batch, args.seed + progress.step, times)
    while progress.done(args) < 1:
        start, batch = processor_seconds(), next(batches)
        factor = schedule(progress.done(args), args.hold)
        loss = train_step(model, found, batch, factor, args.bf16)
        end = processor_seconds()
        progress.record(loss, batch[:, 1:].numel(), end - start)
        if progress.step % args.report == 0:
            rate = batch[:, 1:].numel() / (end - start)
            print(
                f"step {progress.step:6d}  {progress.seconds / 60:5.1f} min  "
                f"{progress.tokens / 1e6:6.2f} M tokens  loss {progress.loss:.3f}  "
                f"{rate:6.0f} tokens/s{unevenness(model.take_load())}",
                flush=True,
            )
        if time.monotonic() - saved > 60 * args.save_minutes:
            save_checkpoint(args.work, model, found, progress)
            saved = time.monotonic()
    save_checkpoint(args.work, model, found, progress)
    return progress


def processor_seconds() -> float:
    """A clock that stands still while the run is stopped or waits for a core."""
    return time.process_time() / torch.get_num_threads()


def imbalance(load: list[int]) -> float:
    """Rows of the busiest expert over the mean of all."""
    return round(max(load) * len(load) / sum(load), 3)


def unevenness(loads: list[list[int]]) -> str:
    """The imbalance of every layer, for a line of progress."""
    return "  imbalance " + " ".join(f"{imbalance(load):.2f}" for load in loads) if loads else ""


def save_checkpoint(
    work: Path, model: Decoder, optimisers: list[torch.optim.Optimizer], progress: Progress
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
    work: Path, model: Decoder, optimisers: list[torch.optim.Optimizer] | None = None
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


# --- command line ---------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the small models of data/.")
    add = parser.add_argument
    add("--experts", type=int, default=0, help="experts per layer (default: none, dense layers)")
    add("--top-k", type=int, default=2, help="experts per token (default: %(default)s)")
    add("--expert-width", type=int, default=160, help="width of an expert (default: %(default)s)")
    add("--balance", type=float, default=0.01,
        help="weight of the load-balancing loss (default: %(default)s)")  # fmt: skip
    add("--start", type=Path, help="dense model whose parts the experts begin as")
    add("--out", type=Path, help="directory to write (default: data/cpython-4m or cpython-moe-7m)")
    add("--work", type=Path, help="directory of checkpoints (default: a temporary one)")
    add("--minutes", type=float, default=60, help="processor time to train (default: %(default)s)")
    add("--steps", type=int, help="steps to train, instead of --minutes")
    add("--hold", type=float, default=0.4,
        help="share of the run before the rates decay (default: %(default)s)")  # fmt: skip
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
    args = parser.parse_args()
    name = "cpython-moe-7m" if args.experts else "cpython-4m"
    args.out = args.out or Path(__file__).resolve().parents[2] / "data" / name
    args.work = args.work or Path(tempfile.gettempdir()) / f"mpishard-{name}"
    return args


def shape_of(args: argparse.Namespace) -> Shape:
    if not args.experts:
        return Shape()
    return MixtureShape(
        intermediate_size=args.expert_width,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        router_aux_loss_coef=args.balance,
    )


def print_sizes(documents: list[Document], tokens: Tokens, model: Decoder) -> None:
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
    shape, documents = shape_of(args), corpus()
    if args.resume or args.export_only:
        tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    elif args.start:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(documents, shape.vocab_size)
    tokenizer.save(str(args.work / "tokenizer.json"))
    tokens, model = Tokens.encode(documents, tokenizer), Decoder(shape)
    if args.start:
        upcycle(model, args.start)
    print_sizes(documents, tokens, model)
    progress = load_checkpoint(args.work, model) if args.export_only else train(model, tokens, args)
    if not args.no_export:
        export(model, tokenizer, tokens, progress, args.out)
        print((args.out / "training.json").read_text())
        print_samples(model, tokenizer, args.seed)


if __name__ == "__main__":
    main()
