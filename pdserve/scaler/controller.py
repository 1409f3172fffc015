"""The controller: state in, actions out. One decision over three speeds, the cheapest that suffices first.

A shortage of prompt engines is met by letting decode engines read short prompts themselves (bypass: with the next
request), else by giving an engine that the other pool has to spare the other role (flip: seconds), else by more engines
(scale: minutes). While new engines start, the quicker ones bridge the time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pdserve.core.endpoint import EngineState, Role
from pdserve.scaler.assess import Assessment, assess
from pdserve.scaler.bounds import Bounds, bounds_at, most_wanted, note, paced, share
from pdserve.scaler.decision import Alternative, Decision, FlipRole, Replicas, Scale, SetBypass, Speed
from pdserve.scaler.demand import Demand, EngineFacts
from pdserve.scaler.memory import Memory, PoolMemory, remember
from pdserve.scaler.policy import Policy

_OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """One moment on two clocks, in seconds."""

    monotonic: float
    unix: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was decided, and how the pools stood. held: what keeps a pool from what it is found to need."""

    memory: Memory
    decisions: tuple[Decision, ...]
    assessments: tuple[Assessment, ...]
    held: Mapping[Role, str]


def decide(policy: Policy, memory: Memory, demand: Demand, cloud: Mapping[Role, Replicas], now: Now) -> Outcome:
    """One look. demand: since the last one. cloud: the pools as their owner has them."""
    memory = remember(memory, demand, policy, now.monotonic)
    found = {role: assess(role, policy, memory, cloud.get(role, Replicas())) for role in policy.pools.by_role()}
    plan = _Plan(policy, memory, found, now)
    plan.bound()
    plan.bypass()
    plan.flip()
    plan.scale()
    return Outcome(
        memory=plan.memory,
        decisions=tuple(plan.decisions),
        assessments=tuple(found.values()),
        held={role: why for role, why in plan.held.items() if why},
    )


class _Plan:
    """The making of one decision, step by step."""

    def __init__(self, policy: Policy, memory: Memory, found: Mapping[Role, Assessment], now: Now) -> None:
        self.memory = memory
        self.decisions: list[Decision] = []
        self.held: dict[Role, str] = {}
        self._policy = policy
        self._pools = policy.pools.by_role()
        self._found = found
        self._now = now
        self._wanted = {role: each.replicas.wanted for role, each in found.items()}
        self._targets: dict[Role, int] = {}
        self._rules = {role: each.rule for role, each in found.items()}
        self._bounds: dict[Role, Bounds] = {}
        self._bypassed = 0.0
        """Engines' worth of prompt work that decode engines take over."""
        self._alternatives: dict[Role, list[Alternative]] = {role: [] for role in found}
        """To more engines, of the pool that is short."""

    def bound(self) -> None:
        """Targets within bounds, windows and budgets."""
        desired = {role: self._bounded(role, each.desired) for role, each in self._found.items()}
        for rule, costs, budget in self._budgets():
            cut = share(desired, self._needs(), {r: b.least for r, b in self._bounds.items()}, costs, budget)
            self._rules |= {role: rule for role in cut if cut[role] != desired[role]}
            desired = cut
        for role, count in desired.items():
            pool, moment = self._pools[role], self._now.monotonic
            kept = note(self.memory.pool(role), pool, count, self._wanted[role], moment, self._policy.flip.spare_for)
            self._remember(role, kept)
            self._targets[role], self.held[role] = paced(kept, pool, self._wanted[role], moment)
            wakes = self._wanted[role] == 0 < count
            if wakes or (count < self._targets[role] and self._rules[role] in ("sleep", "total", "cost_ceiling")):
                self._targets[role], self.held[role] = count, ""

    def _bounded(self, role: Role, desired: int) -> int:
        bounds = self._bounds[role] = bounds_at(self._pools[role], self._now.unix, self._policy.timezone)
        asleep = self._wanted[role] == 0
        idle = self._now.monotonic - self.memory.busy_at
        if bounds.least == 0 and idle >= self._policy.scale_to_zero.idle:
            self._rules[role] = "sleep"
            return 0
        least = max(1, bounds.least) if bounds.most else 0
        if asleep and bounds.least == 0:
            self._rules[role] = "wake"
        if not least <= desired <= bounds.most:
            self._rules[role] = "wake" if asleep else bounds.rule
        return min(bounds.most, max(least, desired))

    def _budgets(self) -> list[tuple[str, dict[Role, float], float]]:
        budgets = []
        if self._policy.total is not None:
            budgets.append(("total", dict.fromkeys(self._pools, 1.0), float(self._policy.total)))
        if self._policy.cost_ceiling is not None:
            costs = {role: pool.cost for role, pool in self._pools.items()}
            budgets.append(("cost_ceiling", costs, self._policy.cost_ceiling))
        return budgets

    def _needs(self) -> dict[Role, float]:
        """What pools share a budget by: the model's figure, or the desired number where there is none."""
        return {role: each.need or float(each.desired) for role, each in self._found.items()}

    def bypass(self) -> None:
        """Have decode engines read as many short prompts as the shortage asks for, while they are well themselves."""
        prefill, decode = self._found.get(Role.PREFILL), self._found.get(Role.DECODE)
        rule, before = self._policy.bypass, self.memory.bypass
        if not rule.enabled or prefill is None or decode is None:
            return
        below, gain, why = self._bypass_for(prefill, decode)
        if below:
            self._bypassed = gain
        self._alternatives[Role.PREFILL].append(
            Alternative(speed=Speed.BYPASS, what=f"prompts below {below} tokens, {gain:.2f} engines' work", why=why)
        )
        if below != before:
            self.memory = replace(self.memory, bypass=below)
            self._decide(SetBypass(below=below, before=before), "bypass", why, prefill)

    def _bypass_for(self, prefill: Assessment, decode: Assessment) -> tuple[int, float, str]:
        """(threshold, engines' worth of work below it, why so)."""
        low, high = self._pools[Role.DECODE].reactive.dead_band
        before = self.memory.bypass
        calm = prefill.pressure <= self._pools[Role.PREFILL].reactive.dead_band[0]
        if not prefill.short and (calm or not before):
            return 0, 0.0, "prefill has what it needs"
        if decode.pressure > (high if before else low):
            return 0, 0.0, f"decode is at {decode.pressure:.2f} of its own target"
        if not prefill.short:
            return before, self._work_below(before), "prefill is not calm yet"
        missing = max(prefill.need - prefill.replicas.ready, 0.0) or 1.0
        sizes = self._sizes_to_bypass()
        if not sizes:
            return 0, 0.0, "no prompt is short enough to be read between two tokens"
        below = next((size for size in sizes if self._work_below(size) >= missing), max(sizes))
        return below, self._work_below(below), f"prefill is short of {missing:.2f} engines"

    def _sizes_to_bypass(self) -> list[int]:
        """Of prompts, in tokens: those that hold up an engine's tokens for no longer than the objective allows one."""
        most, pause = self._policy.bypass.max_tokens, self._policy.slo.tpot.seconds
        short = (each for each in self.memory.window.prompts if each.tokens <= most)
        return [each.tokens for each in short if each.seconds <= pause * each.requests]

    def _work_below(self, tokens: int) -> float:
        window = self.memory.window
        seconds = sum(each.seconds for each in window.prompts if each.tokens <= tokens)
        return seconds / window.seconds if window.seconds else 0.0

    def flip(self) -> None:
        """Give spare engines of one pool the other role, as many as that is short of."""
        rule, moment = self._policy.flip, self._now.monotonic
        for role, other in _OTHER.items():
            if role not in self._found or other not in self._found:
                continue
            short = self._targets[role] - self._wanted[role] - int(self._suffices(role))
            spare = self._wanted[other] - max(
                self._bounds[other].least,
                self._targets[other] if self._targets[other] > self._wanted[other] else 0,
                most_wanted(self.memory.pool(other), rule.spare_for, moment),
            )
            count = min(short, spare)
            if short <= 0:
                continue
            if not rule.enabled:
                why = "flips are not enabled"
            elif count <= 0:
                why = f"{other} has none to spare"
            elif moment < self.memory.flipped_at + rule.cooldown:
                why, count = "the last flip is too recent", 0
            else:
                why = f"{other} has {spare} to spare"
            self._alternatives[role].append(Alternative(speed=Speed.FLIP, what=f"{other} engines to {role}", why=why))
            if rule.enabled and count > 0:
                self._flip(self._leaving(other)[:count], other, role, why)

    def _flip(self, engines: Sequence[EngineFacts], source: Role, target: Role, why: str) -> None:
        for facts in engines:
            action = FlipRole(engine_id=facts.engine_id, role=target)
            self._decide(action, "flip", f"{target} is short, and {why}", self._found[target])
            self.memory = replace(self.memory, flipped_at=self._now.monotonic)
            self._wanted[source] -= 1
            self._wanted[target] += 1
            self._targets[source] = min(self._targets[source], self._wanted[source])

    def _suffices(self, role: Role) -> float:
        """Engines of a role that the bypass makes up for."""
        return self._bypassed if role is Role.PREFILL else 0.0

    def scale(self) -> None:
        """More engines where the others do not suffice, as far as budgets have room beside those that stay a while."""
        for rule, costs, budget in self._budgets():
            stay = {role: min(self._wanted[role], target) for role, target in self._targets.items()}
            cut = share(self._targets, self._needs(), stay, costs, budget)
            self._rules |= {role: rule for role in cut if cut[role] != self._targets[role]}
            self._targets = cut
        for role, each in self._found.items():
            before, target = self._wanted[role], self._targets[role]
            if target > before:
                target = max(before, target - int(self._suffices(role)))
            if target == before:
                continue
            victims = tuple(facts.engine_id for facts in self._leaving(role)) if target < before else ()
            action = Scale(role=role, engines=target, before=before, victims=victims)
            right = "1 engine is" if each.desired == 1 else f"{each.desired} engines are"
            reason = f"{right} right by {self._rules[role]}"
            if self.held[role]:
                reason += f", {self.held[role]} allows {target}"
            self._decide(action, self._rules[role], reason, each)
            kept = self.memory.pool(role)
            moment = self._now.monotonic
            changed = replace(kept, raised_at=moment) if target > before else replace(kept, lowered_at=moment)
            self._remember(role, changed)

    def _leaving(self, role: Role) -> list[EngineFacts]:
        """Who of a pool would best leave it: those with least to do, of these the ones that have computed least, for
        their caches hold least."""
        engines = [e for e in self.memory.window.engines if e.role is role and e.state is EngineState.READY]
        return sorted(engines, key=lambda e: (e.running + e.waiting, e.backlog_seconds, e.busy_seconds, e.engine_id))

    def _remember(self, role: Role, pool_memory: PoolMemory) -> None:
        self.memory = replace(self.memory, pools={**self.memory.pools, role: pool_memory})

    def _decide(self, action: SetBypass | FlipRole | Scale, rule: str, reason: str, about: Assessment) -> None:
        decision = Decision(
            at=self._now.unix,
            action=action,
            rule=rule,
            reason=reason,
            inputs=about.inputs,
            alternatives=tuple(self._alternatives[about.role]),
            dry_run=self._policy.dry_run,
        )
        self.decisions.append(decision)
