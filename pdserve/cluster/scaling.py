"""The scaler of a deployment: hears gateways over gRPC, decides, follows changes of the policy's file."""

from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import msgspec
import structlog

from pdserve.core.clock import Clock
from pdserve.core.errors import ConfigError, MalformedMessage, PdserveError, Unavailable
from pdserve.rpc.channel import open_channel
from pdserve.rpc.generated.pdserve.v1 import scaler_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.scaler_pb2_grpc import (
    ScalerServiceServicer,
    ScalerServiceStub,
    add_ScalerServiceServicer_to_server,
)
from pdserve.scaler.decision import Decision
from pdserve.scaler.demand import Demand, one_after_another, together
from pdserve.scaler.explain import explain, in_words
from pdserve.scaler.load import load_policy
from pdserve.scaler.orders import Orders
from pdserve.scaler.policy import Policy
from pdserve.scaler.runner import Cloud, Scaler
from pdserve.telemetry.scaler_metrics import PoolFigures, ScalerFigures

_log = structlog.get_logger(__name__)

REPORT_EVERY = 1.0
"""Seconds between two reports of a gateway."""
_TIMEOUT = 5.0

See = Callable[[], Awaitable[None]]

_ReportContext = grpc.aio.ServicerContext[pb.DemandReport, Awaitable[pb.ScalerOrders]]
_ExplainContext = grpc.aio.ServicerContext[pb.ExplainScalingRequest, Awaitable[pb.ScalingExplanation]]


class Scaling(ScalerServiceServicer):
    """Owns a Scaler and the file its policy is from."""

    def __init__(
        self,
        path: Path,
        cloud: Cloud,
        clock: Clock,
        *,
        see: See | None = None,
        done: Callable[[Decision, PdserveError | None], None] = lambda decision, failure: None,
        refuse: Callable[[Policy], str] = lambda policy: "",
    ) -> None:
        """see: looks at the pools before each decision; when it raises PdserveError, nothing is decided. done: as of
        Scaler. refuse: why a policy cannot be had with this cloud. Raises ConfigError for a policy that cannot work."""
        self._path = path
        self._clock = clock
        self._seen = _stamp(path)
        self._see = see
        self._refuse = refuse
        self._scaler = Scaler(self._load(), cloud, clock, tell=_log_decision, done=done)
        self._blind = ""
        self._reports: dict[str, Demand] = {}
        """By gateway, what it has told since the last decision."""
        self._refusal = ""
        self._reloads: Counter[str] = Counter()

    def register(self, server: grpc.aio.Server) -> None:
        add_ScalerServiceServicer_to_server(self, server)

    async def run(self) -> None:
        """Decide again and again. Without a word from any gateway nothing is known, so nothing changes."""
        while True:
            await self._clock.sleep(self._scaler.policy.interval)
            try:
                await self.look()
            except Exception:  # pools stay as they are until the next look; the engines must not suffer for it
                _log.exception("the scaler failed internally")

    async def prepare(self) -> None:
        """Look at the pools again and again, without deciding: for as long as engines first start."""
        while True:
            await self._look_at_pools()
            await self._clock.sleep(self._scaler.policy.interval)

    async def look(self) -> None:
        """Decide on what was heard since the last time, if the pools can be seen."""
        self._reload()
        await self._look_at_pools()
        demand = self.heard()
        if demand and self._blind:
            self._scaler.remember(demand)
        elif demand:
            await self._scaler.step(demand)

    async def _look_at_pools(self) -> None:
        if self._see is None:
            return
        try:
            await self._see()
        except PdserveError as error:
            if not self._blind:
                _log.error("the pools cannot be seen; nothing is decided", code=error.code, cause=str(error))
            self._blind = str(error)
        else:
            if self._blind:
                _log.info("the pools are seen again")
            self._blind = ""

    def heard(self) -> Demand | None:
        """What gateways have told since this was last asked, together."""
        reports, self._reports = self._reports, {}
        return together(reports.values())

    def _load(self) -> Policy:
        policy = load_policy(self._path)
        if reason := self._refuse(policy):
            raise ConfigError(f"{self._path}: {reason}")
        return policy

    def _reload(self) -> None:
        """Take the policy's file again if it has changed. One that is wrong is refused, and the last one stays."""
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._scaler.policy = self._load()
        except ConfigError as error:
            self._refusal = str(error)
            self._reloads["refused"] += 1
            _log.error("the policy has changed and is refused; the one before stays", cause=self._refusal)
        else:
            self._refusal = ""
            self._reloads["ok"] += 1
            _log.info("the policy has changed", path=str(self._path), dry_run=self._scaler.policy.dry_run)

    async def ReportDemand(self, request: pb.DemandReport, context: _ReportContext) -> pb.ScalerOrders:
        try:
            demand = msgspec.json.decode(request.demand_json, type=Demand)
        except msgspec.MsgspecError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"this is no report of demand: {error}")
        known = self._reports.get(request.gateway)
        self._reports[request.gateway] = one_after_another([known, demand] if known else [demand]) or demand
        orders = self._scaler.orders
        return pb.ScalerOrders(
            bypass_below=orders.bypass_below,
            patience=orders.patience,
            figures_json=msgspec.json.encode(self.figures()),
        )

    async def ExplainScaling(
        self, request: pb.ExplainScalingRequest, context: _ExplainContext
    ) -> pb.ScalingExplanation:
        told = {"policy": str(self._path), "refusal": self._refusal, "blind": self._blind}
        explanation = {**told, **explain(self._scaler)}
        return pb.ScalingExplanation(explanation_json=msgspec.json.encode(explanation))

    def figures(self) -> ScalerFigures:
        """For metrics."""
        outcome = self._scaler.latest
        return ScalerFigures(
            pools=tuple(
                PoolFigures(
                    role=each.role.value,
                    wanted=each.replicas.wanted,
                    ready=each.replicas.ready,
                    warming=each.replicas.warming,
                    need=each.need,
                    pressure=each.pressure,
                )
                for each in (outcome.assessments if outcome else ())
            ),
            decisions=tuple((speed, rule, count) for (speed, rule), count in self._scaler.counts.items()),
            failures=tuple(self._scaler.failures.items()),
            reloads=tuple(self._reloads.items()),
            bypass_below=self._scaler.orders.bypass_below,
            dry_run=self._scaler.policy.dry_run,
            blind=bool(self._blind),
            refused=bool(self._refusal),
        )


def _log_decision(decision: Decision) -> None:
    _log.info(in_words(decision), rule=decision.rule, reason=decision.reason, dry_run=decision.dry_run)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Of the file, which may be behind links: a mounted ConfigMap changes by one that leads elsewhere."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


async def report_demand(address: str, gateway: str, demand: Demand) -> tuple[Orders, ScalerFigures]:
    """Tell the scaler at an address. Raises Unavailable when it does not answer, MalformedMessage."""
    report = pb.DemandReport(gateway=gateway, demand_json=msgspec.json.encode(demand))
    async with open_channel(address) as channel:
        try:
            answer = await ScalerServiceStub(channel).ReportDemand(report, timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the scaler does not answer ({error.code().name.lower()})") from None
    try:
        figures = msgspec.json.decode(answer.figures_json, type=ScalerFigures)
    except msgspec.MsgspecError as error:
        raise MalformedMessage(f"the scaler's figures are malformed: {error}") from error
    return Orders(bypass_below=answer.bypass_below, patience=answer.patience), figures


async def explain_scaling(address: str) -> bytes:
    """The scaler's state and decisions as JSON. Raises Unavailable."""
    async with open_channel(address) as channel:
        try:
            answer = await ScalerServiceStub(channel).ExplainScaling(pb.ExplainScalingRequest(), timeout=_TIMEOUT)
        except grpc.aio.AioRpcError:
            raise Unavailable("the scaler does not answer; try again in a few seconds") from None
    return bytes(answer.explanation_json)
