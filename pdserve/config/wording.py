"""What pydantic says of a value, in the words of this project."""

_WORDING = {
    "Input should": "must",
    "Value should": "must",
    "String should": "must",
    "Value error, ": "",
    " after validation": "",
    "must be an object": "must be a section with settings of its own",
    "must be a valid boolean": "must be true or false",
}


def plain(message: str) -> str:
    """A validation message without the validator's own terms."""
    for wordy, short in _WORDING.items():
        message = message.replace(wordy, short)
    return message
