"""Errors that a user can mend: the command line prints them as one line and exits with status 2."""


class UserError(Exception):
    """Something in a recipe, a file or a command that its owner can put right; the message says how."""
