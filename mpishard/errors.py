"""What goes wrong, and is explained by one sentence."""


class UserError(Exception):
    """A wrong call or bad input: one sentence that names the file, field or flag, the value it
    has and what would be right.

    The command line prints it after ``mpishard: error:`` and ends with status 2, without a
    traceback. Names and values come from files and may hold anything: what does not print, line
    ends among it, is escaped.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(map(_legible, sentence)))


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
