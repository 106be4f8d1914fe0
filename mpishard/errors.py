"""What goes wrong, and is explained by one sentence."""


class UserError(Exception):
    """A wrong call or bad input: one sentence that names the file, field or flag, the value it
    has and what would be right.

    The command line prints it after ``mpishard: error:`` and ends with status 2, without a
    traceback.
    """


class Mismatch(Exception):
    """Ranks of a group that do not begin the same collective: one sentence that names two of them,
    what each begins and from where.

    A fault of the program, found by comparing the ranks before the collective could hang or mix up
    their data: the command line ends with status 1.
    """
