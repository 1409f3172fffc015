"""What each sequence asked of sampling, and the history that begins with it, kept from its first sampled row on."""

from collections.abc import Iterable

from pdserve.core.batch import Row, SamplerInit
from pdserve.worker.seen_tokens import SeenTokens


class RowSettings:
    """Settings by sequence id. In seen those have a history whose repetition is penalised."""

    def __init__(self, seen: SeenTokens) -> None:
        self._settings: dict[int, SamplerInit] = {}
        self._seen = seen

    def of(self, row: Row) -> SamplerInit:
        """A row's settings; it brings them, and its history begins anew, or the sequence did before. Raises ValueError
        when it never did."""
        if row.sampler is not None:
            self._settings[row.sequence_id] = row.sampler
            self._seen.drop(row.sequence_id)
            if row.sampler.repetition_penalty != 1:
                self._seen.start(row.sequence_id, row.sampler.seen_token_ids)
        if row.sequence_id not in self._settings:
            raise ValueError(f"sequence {row.sequence_id} is sampled without ever having been given its settings")
        return self._settings[row.sequence_id]

    def drop(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences; unknown ones are ignored."""
        for sequence_id in sequence_ids:
            self._settings.pop(sequence_id, None)
            self._seen.drop(sequence_id)


def sampled_position(row: Row) -> int:
    """Where the token stands that a row samples."""
    return row.start + row.num_tokens


def banned_tokens(row: Row, init: SamplerInit) -> tuple[int, ...]:
    """The tokens a row may not choose because it has not had its min_tokens yet."""
    return init.banned_token_ids if sampled_position(row) - init.prompt_len < init.min_tokens else ()
