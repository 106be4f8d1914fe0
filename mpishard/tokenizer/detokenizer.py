"""The text of an answer as it grows: piece by piece, and up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpishard.engine.sampling_params import SamplingParams
from mpishard.tokenizer.text_stream import TextStream
from mpishard.tokenizer.tokenizer import Tokenizer

# Characters of the text, and whether each is shown: those of special tokens may not be.
Characters = list[tuple[str, bool]]


class IncrementalDetokenizer:
    """The text of an answer, token by token, up to the first of the stop strings of `params`:
    without half characters, and never with a part of a stop string. Stop strings are looked for in
    the text with its special tokens, which are not shown if `params` skip them.

    `prompt` are the ids that the answer follows. They decide whether its first word begins with a
    space, and a character that they begin belongs to the answer, which completes it. `write` is
    called with each new piece.
    """

    def __init__(
        self,
        text: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008 (immutable)
        write: Callable[[str], Any] = lambda piece: None,
    ) -> None:
        self.params, self._write = params, write
        self._special = text.special_texts if params.skip_special_tokens else {}
        self._stream = TextStream(text, prompt, params.skip_special_tokens)
        self._taken = 0  # tokens of the answer
        self._pending: Characters = []
        self._between: list[tuple[int, str]] = []  # special tokens in the provisional text
        self._pieces: list[str] = []
        self.stopped = False

    def __str__(self) -> str:
        """The text so far, without what may turn out to begin a stop string."""
        return "".join(self._pieces)

    def update(self, answer: Sequence[int]) -> bool:
        """Take in the tokens by which `answer` has grown; whether it has reached a stop string."""
        for token in answer[self._taken :]:
            self._taken += 1
            if token in self._special:
                self._between.append((len(self._stream.provisional), self._special[token]))
                self._settle("")
            else:
                self._settle(self._stream.push(token))
            self._look_for_stops()
        return self.stopped

    def flush(self) -> None:
        """Write what was held back: nothing will follow that changes it or makes a stop string of
        it."""
        if not self.stopped:
            self._settle(self._stream.provisional)
            self._emit(len(self._pending))

    def _settle(self, text: str) -> None:
        """Append `text`, which is certain, with the special tokens within it."""
        if text or not self._stream.provisional:
            self._pending += self._interleaved(text)
            self._between = []

    def _interleaved(self, text: str) -> Characters:
        characters = [(character, True) for character in text]
        for offset, special in reversed(self._between):
            characters[offset:offset] = [(character, False) for character in special]
        return characters

    def _look_for_stops(self) -> None:
        """Write as much as is certain. The stop string counts that is complete first."""
        if self.stopped:
            return
        tail = self._interleaved(self._stream.provisional)
        text = "".join(character for character, _ in self._pending + tail)
        places = [(text.find(stop), len(stop)) for stop in self.params.stop]
        found = [(place + length, place) for place, length in places if place >= 0]
        if found:
            end, start = min(found)
            self._pending += tail
            self._emit(start)
            if self.params.include_stop_str_in_output:
                self._pending = [(character, True) for character, _ in self._pending]
                self._emit(end - start)
            self.stopped = True
        else:
            # The provisional text may come to be another: see what the certain part begins, too.
            certain = text[: len(self._pending)]
            ends = [len(one) - self._held_back(one) for one in (certain, text)]
            self._emit(min(ends))

    def _held_back(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.params.stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.params.stop):
                return length
        return 0

    def _emit(self, length: int) -> None:
        piece = "".join(character for character, shown in self._pending[:length] if shown)
        self._pending = self._pending[length:]
        if piece:
            self._pieces.append(piece)
            self._write(piece)


def finish_output(
    answer: Sequence[int], finish_reason: str, growing: IncrementalDetokenizer | None
) -> dict[str, str | list[int] | None]:
    """What an answer's tokens, which are complete, come to: `text`, None without one that grows,
    `output_ids` and `finish_reason`."""
    if growing:
        growing.update(answer[:-1])
        ended_by_token = finish_reason == "stop" and not growing.stopped
        if growing.params.include_stop_str_in_output or not ended_by_token:
            growing.update(answer)
        growing.flush()
        finish_reason = "stop" if growing.stopped else finish_reason
    text = None if growing is None else str(growing)
    return {"text": text, "output_ids": list(answer), "finish_reason": finish_reason}
