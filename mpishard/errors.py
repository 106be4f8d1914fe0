"""What goes wrong, and is explained by one sentence."""

from __future__ import annotations


class UserError(Exception):
    """A wrong call or bad input: one sentence that names the file, field or flag, the value it
    has and what would be right.

    The command line prints it after ``mpishard: error:`` and ends with status 2, without a
    traceback. Names and values come from files and may hold anything: what does not print, line
    ends among it, is escaped.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(map(_legible, sentence)))


class WrongRanks(UserError):
    """A number of ranks that the layout does not fit. The `sentence` has "{command}" where the
    command to type stands, which starts `ranks` ranks with this `tp`."""

    def __init__(self, sentence: str, ranks: int, tp: int, command: str | None = None) -> None:
        super().__init__(sentence.replace("{command}", command or f"mpirun -n {ranks} …"))
        self.sentence, self.ranks, self.tp, self.command = sentence, ranks, tp, command

    def __reduce__(self) -> tuple[type[WrongRanks], tuple[str, int, int, str | None]]:
        return WrongRanks, (self.sentence, self.ranks, self.tp, self.command)

    def with_command(self, command: str) -> WrongRanks:
        """The same, with the `command` that its reader has to type."""
        return WrongRanks(self.sentence, self.ranks, self.tp, command)


def brief(text: str, most: int = 100) -> str:
    """A name from a file as a part of a sentence, cut off after so many characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def _legible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


class CollectiveMismatch(Exception):
    """Ranks of a group that do not begin the same collective: one sentence that names two of them,
    what each begins and from where.

    A fault of the program, found by comparing the ranks before the collective could hang or mix up
    their data: the command line ends with status 1.
    """
