"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string to be completed, and holds back text that may turn out to begin one.

    One Knuth-Morris-Pratt automaton per stop string, so the result does not depend on how the text was cut
    into pieces. Of several completed by the same character the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in stops)
        self._matched = [0] * len(self._stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was completed.

        After a stop the text before the stop string is all there is; the matcher is not fed again."""
        if not self._stops:
            return text, False
        for position, char in enumerate(text):
            length = self._advance(char)
            if length:
                return (self._held + text[: position + 1])[:-length], True
        text = self._held + text
        shown = len(text) - max(self._matched)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> int:
        """Length of the longest stop string this character completes, else 0."""
        completed = 0
        for i, stop in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = self._borders[i][matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                completed = max(completed, matched)
            self._matched[i] = matched
        return completed


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        if text[i] == text[length]:
            length += 1
        borders[i] = length
    return borders
