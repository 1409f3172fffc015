"""Server-sent events from raw bytes, however they are cut.

Only what generation streams use: the data of each event. Other fields and comments are read and dropped.
Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class SseParser:
    """Feed it what arrives; it gives back the events that became complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that end in this chunk, in order; several data lines are joined by a line feed."""
        text = self._rest + chunk
        events = []
        start = 0
        for end in _LINE_END.finditer(text):
            if end.end() == len(text) and end.group() == b"\r":
                break  # perhaps half of \r\n
            event = self._line(text[start : end.start()])
            if event is not None:
                events.append(event)
            start = end.end()
        self._rest = text[start:]
        return events

    def _line(self, line: bytes) -> bytes | None:
        if not line:
            event = b"\n".join(self._data) if self._data else None
            self._data.clear()
            return event
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None
