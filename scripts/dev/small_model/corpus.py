"""The text that ships with CPython, and its tokens."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

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
