"""What a run is asked to do: the command line's options, checked, and the plan they mean."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from pdserve_loadgen.arrivals import Arrivals
from pdserve_loadgen.endpoint import Api
from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.lengths import parse_lengths
from pdserve_loadgen.slo import Slo
from pdserve_loadgen.traces import Scaling, read_trace
from pdserve_loadgen.workload import Limits, PlannedRequest, Synthetic, limited, replay

DEFAULT_REQUESTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options as given; names as on the command line, explained there."""

    url: str
    model: str | None = None
    api: Api = Api.CHAT
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    rate: float | None = None
    arrivals: Arrivals = Arrivals.POISSON
    concurrency: int | None = None
    requests: int | None = None
    duration: float | None = None
    warmup: int = 0
    seed: int = 0
    input: str = "512"
    output: str = "128"
    prefix_tokens: int = 0
    prefix_groups: int = 1
    turns: int = 1
    trace: Path | None = None
    speed: float = 1.0
    length_scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None
    tokenizer: Path | None = None
    ignore_eos: bool = True
    extra_body: str | None = None
    cancel_fraction: float = 0.0
    slo: str | None = None

    def check(self) -> None:
        """Raises UsageError for options that contradict each other."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(f"--url {self.url!r} is not an address; write http://HOST:PORT")
        if self.trace and (self.rate or self.concurrency):
            raise UsageError("--trace brings its own arrivals: leave --rate and --concurrency out, use --speed")
        if not self.trace and bool(self.rate) == bool(self.concurrency):
            raise UsageError("give --rate (open loop), --concurrency (closed loop) or --trace, one of them")
        if self.trace and self.turns > 1:
            raise UsageError("--turns goes with --rate or --concurrency; a trace has its own turns")
        self.body_fields()
        self.targets()

    def targets(self) -> Slo | None:
        return Slo.parse(self.slo) if self.slo else None

    def body_fields(self) -> dict[str, object]:
        """What goes into every body beside prompt and length."""
        fields: dict[str, object] = {"ignore_eos": True} if self.ignore_eos else {}
        if self.extra_body:
            try:
                given = orjson.loads(self.extra_body)
            except ValueError:
                given = None
            if not isinstance(given, dict):
                raise UsageError("--extra-body must be a JSON object such as '{\"temperature\": 0}'")
            fields |= given
        return fields

    def plan(self) -> Iterator[PlannedRequest]:
        """The requests to send. Raises UsageError."""
        limits = Limits(
            requests=self._request_limit(),
            duration=self.duration,
            warmup=self.warmup,
            cancel_fraction=self.cancel_fraction,
        )
        return limited(self._endless(), limits, self.seed)

    def _request_limit(self) -> int | None:
        unlimited = self.trace is not None or self.duration is not None
        return self.requests if self.requests is not None or unlimited else DEFAULT_REQUESTS

    def _endless(self) -> Iterator[PlannedRequest]:
        if self.trace:
            scaling = Scaling(
                speed=self.speed,
                length_scale=self.length_scale,
                max_input=self.max_input,
                max_output=self.max_output,
            )
            return replay(read_trace(self.trace, scaling))
        synthetic = Synthetic(
            input=parse_lengths(self.input),
            output=parse_lengths(self.output),
            rate=self.rate,
            arrivals=self.arrivals,
            prefix_tokens=self.prefix_tokens,
            prefix_groups=self.prefix_groups,
            turns=self.turns,
        )
        return synthetic.plan(self.seed)

    def to_dict(self) -> dict[str, object]:
        """For the report; without the key."""
        names = [name for name in self.__dataclass_fields__ if name != "api_key"]
        values = {name: getattr(self, name) for name in names}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @property
    def title(self) -> str:
        if self.trace:
            load = f"{self.trace.name} at {self.speed:g}x speed"
        elif self.rate:
            load = f"{self.rate:g} requests/s, {self.arrivals.value} arrivals"
        else:
            load = f"{self.concurrency} at a time"
        return f"{self.url}, {self.api.value}: {load}, seed {self.seed}"
