"""The one exception type for mistakes that a user can mend."""


class UserError(ValueError):
    """Bad input: the message is one clear sentence that names what was expected and what was found.

    Command lines print it without a traceback and exit with code 2.
    """
