"""How a process ended, in words."""

from signal import Signals


def manner_of_end(code: int) -> str:
    """Of an exit code, negative for a signal: the end of a sentence about the process."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"was killed by signal {-code}"
