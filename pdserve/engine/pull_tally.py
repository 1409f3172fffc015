"""What the pulls of one fetch did, for the request's record."""

from dataclasses import dataclass, field
from typing import TypedDict

from pdserve.core.protocols import PullReceipt
from pdserve.engine.pull_mode import PullForecast, PullMode


class TransferFields(TypedDict):
    """As in core.request.EngineTrace."""

    transfer_backend: str
    transfer_bytes: int
    transfer_pulls: int
    transfer_mode: str
    transfer_forecast: tuple[tuple[str, float], ...]
    transfer_stages: tuple[tuple[str, float], ...]
    transfer_failovers: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class PullTally:
    """Totals over verified pulls. backend is the one that brought the latest of them, or was going to."""

    backend: str = ""
    forecast: PullForecast = field(default_factory=PullForecast)
    num_bytes: int = 0
    num_pulls: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, as in PullReceipt, summed over pulls that may have run side by side."""
    failovers: list[tuple[str, str]] = field(default_factory=list)
    """(backend, error code) of reads that another backend took over."""

    def add(self, receipt: PullReceipt) -> None:
        self.backend = receipt.backend
        self.num_bytes += receipt.num_bytes
        self.num_pulls += 1
        self.failovers += receipt.failovers
        for stage, seconds in (
            ("queue", receipt.queue_seconds),
            ("post", receipt.post_seconds),
            ("wire", receipt.wire_seconds),
            ("verify", receipt.verify_seconds),
        ):
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def trace(self) -> TransferFields:
        """The fields of a core.request.EngineTrace that tell of the transfer."""
        known = self.forecast.progressive or self.forecast.bulk
        return TransferFields(
            transfer_backend=self.backend,
            transfer_bytes=self.num_bytes,
            transfer_pulls=self.num_pulls,
            transfer_mode=self.forecast.mode.value if self.backend else "",
            transfer_forecast=(
                (PullMode.PROGRESSIVE.value, self.forecast.progressive),
                (PullMode.BULK.value, self.forecast.bulk),
            )
            if known
            else (),
            transfer_stages=tuple(self.stages.items()),
            transfer_failovers=tuple(self.failovers),
        )
