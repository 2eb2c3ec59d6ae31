"""What a command ends with where it cannot do what was asked."""


class CommandError(ValueError):
    """Something that cannot be done as asked; the message says what could be."""
