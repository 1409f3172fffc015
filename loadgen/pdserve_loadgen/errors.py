"""Errors of the generator itself, not of the requests it sends."""


class LoadgenError(Exception):
    """`str(error)` tells the user what to do."""


class UsageError(LoadgenError):
    """An option or an input file is wrong."""


class Unreachable(LoadgenError):
    """No endpoint answers where the user said."""
