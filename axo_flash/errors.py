"""The root of errors that are about what the user gave, not about this program."""


class UserError(ValueError):
    """Wrong input: the message says what was got, what was expected and what to do, and no traceback is needed."""
