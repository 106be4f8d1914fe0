"""Training: optimisers, learning rate, steps and checkpoints."""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from small_model.corpus import KINDS, Tokens
from small_model.network import Decoder


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
