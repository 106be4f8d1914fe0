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
import tempfile
from pathlib import Path

import torch
from small_model.corpus import KINDS, Document, Tokens, corpus, train_tokenizer
from small_model.export import export, print_samples
from small_model.network import Decoder, MixtureShape, Shape, upcycle
from small_model.training import load_checkpoint, train
from tokenizers import Tokenizer


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
