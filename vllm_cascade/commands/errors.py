"""The error with which a command refuses what a user asked for."""


class CommandError(ValueError):
    """A command cannot do what was asked; the message says what it could do."""
