"""What goes wrong through no fault of the program."""


class UserError(Exception):
    """A wrong call or bad input: one sentence that names the file, field or flag, the value it
    has and what would be right.

    The command line prints it after ``mpishard: error:`` and ends with status 2, without a
    traceback.
    """
