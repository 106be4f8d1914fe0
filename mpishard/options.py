"""What commands have in common on the command line: the parser, types of values, groups of options.

Nothing here needs NumPy.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from typing import Any, NoReturn

from mpishard.config.layout import layout_options
from mpishard.errors import UserError
from mpishard.runtime import launch

_FLAGS = {option.name: option.flags for option in layout_options()}
TP_FLAGS, CP_FLAGS, EP_FLAGS = (_FLAGS[degree] for degree in ("tp", "cp", "ep"))

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a UserError's one message, and that takes no flag twice
    unless it is meant to be repeated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("action", None, Once)
        self.commands: dict[str, Parser] = {}

    def takes(self, flag: str) -> bool:
        """Whether it has this flag."""
        return flag in self._option_string_actions

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; a command refuses words that it does not know itself, and so points to
        its own help."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


class Once(argparse.Action):
    """Stores the value of a flag, and refuses a second one: none is ever silently ignored."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.given: argparse.Namespace | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.given is namespace:
            raise argparse.ArgumentError(self, "given twice")
        self.given = namespace
        setattr(namespace, self.dest, values)


def count(text: str) -> int:
    """A number of things, at least 1, from the command line."""
    number = integer(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def integer(text: str) -> int:
    """A whole number from the command line."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def token_ids(text: str) -> tuple[int, ...]:
    """Token ids, with commas between them, from the command line."""
    return tuple(integer(token) for token in text.split(","))


def json_object(text: str) -> dict[str, Any]:
    """A JSON object from the command line."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def size(text: str) -> int:
    """A number of bytes, at least 1, from the command line."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?((?:[KMGT]i?)?)B?", text, re.ASCII)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in bytes, such as 500MB or 2GiB")
    return size


def number(text: str) -> float:
    """A number from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def bias(text: str) -> tuple[int, float]:
    """A token id and a number, such as 198=-5, from the command line."""
    token, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token id and a number, such as 198=-5")
    return integer(token), number(value)


def add_model(command: argparse.ArgumentParser) -> None:
    """The model, which most commands are given first."""
    command.add_argument("model", metavar="MODEL", help="a Hugging Face or a shard directory")
    command.add_argument(
        "--ignore-config", action="append", default=[], metavar="FIELD",
        help="a field of config.json that mpishard refuses, but that does not change the "
        "mathematics, as you know; may be given several times",
    )  # fmt: skip


def add_layout(command: argparse.ArgumentParser) -> None:
    """The layout of ranks, and how numbers are computed."""
    layout = command.add_argument_group("layout")
    for option in layout_options():
        layout.add_argument(*option.flags, **option.argument({int: count, float: number}))
    layout.add_argument(
        "--max-model-len", type=count, default=None, metavar="N",
        help="the number of positions, in place of that of config.json",
    )  # fmt: skip
    layout.add_argument(
        "--compute-dtype", choices=("float32", "float64"), default="float32",
        help="the type of all arithmetic; float64 tells rounding from mistakes (default: float32)",
    )  # fmt: skip


def add_watchdog(command: argparse.ArgumentParser) -> None:
    """What is done when a collective hangs."""
    watch = command.add_argument_group("when something hangs")
    watch.add_argument(
        "--timeout", type=number, default=launch.TIMEOUT, metavar="SECONDS",
        help="end the job, and say where every rank is, when a collective takes longer; ranks that "
        "wait for one that computes, reads or writes are in a collective, so be generous "
        f"(default: {launch.TIMEOUT:g}; 0: never)",
    )  # fmt: skip
    watch.add_argument(
        "--check-collectives", action="store_true",
        help="compare, before each collective, what the ranks are about to do: slow, and a rank "
        "that does something else is named",
    )  # fmt: skip


def add_chunked_prefill(command: argparse.ArgumentParser) -> None:
    """The size of the chunks in which prompts are processed."""
    command.add_argument(
        "--chunked-prefill-size", type=count, default=None, metavar="N",
        help="process prompts in chunks of at most N tokens a step (default: whole)",
    )  # fmt: skip


def add_expert_load(command: argparse.ArgumentParser) -> None:
    """Whether the load of experts is counted."""
    command.add_argument(
        "--expert-load", nargs="?", const="", default=None, metavar="FILE.json",
        help="count the (token, expert) pairs of every expert and rank; print their imbalance at "
        "the end, and write them to FILE.json if it is given",
    )  # fmt: skip


def add_routing(command: argparse.ArgumentParser) -> None:
    """Router replay."""
    command.add_argument(
        "--record-routing", default=None, metavar="FILE.npz",
        help="write the experts that the routers choose for each token, and their weights",
    )  # fmt: skip
    command.add_argument(
        "--replay-routing", default=None, metavar="FILE.npz",
        help="take experts and weights from what --record-routing wrote, not from the routers",
    )  # fmt: skip


def add_bos(command: argparse.ArgumentParser) -> None:
    """Whether prompts begin with a token that the tokenizer does not add, or adds."""
    command.add_argument(
        "--add-bos", action=argparse.BooleanOptionalAction, default=None,
        help="begin every prompt of text with the tokenizer's bos_token, or do not; a chat "
        "template writes its own (default: as the tokenizer does)",
    )  # fmt: skip


def add_chat(command: argparse.ArgumentParser) -> None:
    """Whether the chat template is applied, and what it is given."""
    command.add_argument(
        "--chat", action="store_true", help="apply the model's chat template to every prompt"
    )
    command.add_argument(
        "--chat-template-kwargs", type=json_object, default=None, metavar="JSON",
        help='variables of the chat template, such as {"enable_thinking": false}',
    )  # fmt: skip


def add_sampling(command: argparse.ArgumentParser) -> None:
    """The fields of `SamplingParams`. What is not typed is None, so that a model's own defaults can
    stand in for it."""
    sampling = command.add_argument_group(
        "sampling", "A temperature above 0 makes answers differ with --seed, and with it alone."
    )
    sampling.add_argument(
        "--generation-config", default="none", metavar="WHICH",
        help="where sampling defaults come from: auto, which is MODEL's generation_config.json, or "
        "such a file or its directory; none (default) is the defaults named here",
    )  # fmt: skip
    sampling.add_argument(
        "--max-tokens", "--max-new-tokens", type=count, default=None, metavar="N",
        help="tokens to generate at most (default: 128)",
    )  # fmt: skip
    sampling.add_argument(
        "--temperature", type=number, default=None, metavar="X", help="0 is greedy (default: 0)"
    )
    sampling.add_argument(
        "--top-k", type=integer, default=None, metavar="N",
        help="keep the N likeliest tokens (0 or -1: all)",
    )  # fmt: skip
    sampling.add_argument(
        "--top-p", type=number, default=None, metavar="X",
        help="keep the fewest tokens whose probabilities reach X (default: 1, all)",
    )  # fmt: skip
    sampling.add_argument(
        "--min-p", type=number, default=None, metavar="X",
        help="keep tokens at least X times as probable as the likeliest (default: 0, all)",
    )  # fmt: skip
    sampling.add_argument(
        "--seed", type=integer, default=None, metavar="N",
        help="of the random numbers (default: 0)",
    )  # fmt: skip
    sampling.add_argument(
        "--n", type=count, default=None, metavar="N", help="answers to each prompt (default: 1)"
    )
    sampling.add_argument(
        "--logprobs", type=integer, default=None, metavar="N",
        help="log-probabilities of the chosen token and of the N likeliest",
    )  # fmt: skip
    sampling.add_argument(
        "--repetition-penalty", type=number, default=None, metavar="X",
        help="divide logits above 0 of tokens in prompt and answer by X, multiply the others "
        "(default: 1, none)",
    )  # fmt: skip
    sampling.add_argument(
        "--presence-penalty", type=number, default=None, metavar="X",
        help="subtract X from the logits of tokens in the answer (default: 0)",
    )  # fmt: skip
    sampling.add_argument(
        "--frequency-penalty", type=number, default=None, metavar="X",
        help="subtract X as often as the answer has the token (default: 0)",
    )  # fmt: skip
    sampling.add_argument(
        "--logit-bias", type=bias, action="append", default=[], metavar="ID=X",
        help="add X to the logit of this token; may be given several times",
    )  # fmt: skip
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )  # fmt: skip
    sampling.add_argument(
        "--stop-token-ids", type=token_ids, default=(), metavar="ID,ID",
        help="end the answer with any of these tokens",
    )  # fmt: skip
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end-of-sequence token"
    )
    sampling.add_argument(
        "--include-stop-str-in-output", action="store_true",
        help="the text has what ended the answer: the text of --stop, or a token",
    )  # fmt: skip
    sampling.add_argument(
        "--skip-special-tokens", action=argparse.BooleanOptionalAction, default=True,
        help="leave special tokens out of the text (default: yes)",
    )  # fmt: skip
