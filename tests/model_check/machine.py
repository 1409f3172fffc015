"""What can happen to handoffs and loans, in any order: requests, cancels, lost engines, bad lines, bad reads, time."""

from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.model_check.cluster import PAIRS, SOURCES, TARGETS, WHO_HOLDS_MOST, Client, Cluster
from tests.model_check.device import NUM_BLOCKS, Prefix
from tests.model_check.network import Fault, Stream
from tests.model_check.reads import Read

_T = TypeVar("_T")

SOURCE = st.sampled_from(SOURCES)
TARGET = st.sampled_from(TARGETS)
ENGINE = st.sampled_from(SOURCES + TARGETS)
LENDER = st.sampled_from(("", WHO_HOLDS_MOST, WHO_HOLDS_MOST, *SOURCES, *TARGETS))
PAIR = st.sampled_from(PAIRS)
INDEX = st.integers(0, 20)
BREATH = 0.011
"""Seconds that pass after everything that happens: one message gets through."""


def pick(items: list[_T], index: int) -> _T:
    return items[index % len(items)]


class HandoffMachine(RuleBasedStateMachine):
    """Two prefill engines, two decode engines. At its end all faults cease, and everything must become free."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()

    def teardown(self) -> None:
        try:
            self.cluster.come_to_rest()
            self.cluster.check_rest()
        finally:
            self.cluster.close()

    @invariant()
    def promises_are_kept(self) -> None:
        self.cluster.check()

    def passed(self) -> list[Client]:
        return [client for client in self.cluster.clients if client.ticket is not None and client.late]

    def reads(self) -> list[Read]:
        return self.cluster.fabric.reads

    def streams(self) -> list[Stream]:
        return self.cluster.network.streams

    def alive(self, engine_id: str) -> bool:
        return self.cluster.incarnations[engine_id].node.alive

    def _use(self, stream: Stream, prompt: Prefix) -> None:
        """Have KV go over a line: of the prompt by a handoff, where that can be, otherwise of others by a loan."""
        source, target = self.cluster.ends(stream)
        if source in SOURCES and target in TARGETS:
            self.cluster.submit(prompt, 2, source, target, late=False)
        else:
            self.cluster.submit((1, 2, 3, 4, 5, 6, 7, *prompt[-1:]), 2, target, target, late=False, lender=source)

    @initialize(prefill=SOURCE, decode=TARGET, held=st.booleans())
    def begin(self, prefill: str, decode: str, held: bool) -> None:
        if held:
            self.cluster.held.add((prefill, decode))
        self.cluster.submit((1, 2, 3, 4, 5, 6, 7), 3, prefill, decode, late=False)

    @rule(
        first=st.integers(1, 3),
        length=st.integers(1, 9),
        max_tokens=st.sampled_from((1, 2, 3, 4, 14)),
        prefill=SOURCE,
        decode=TARGET,
        late=st.booleans(),
        lender=LENDER,
    )
    def submit(
        self, first: int, length: int, max_tokens: int, prefill: str, decode: str, late: bool, lender: str = ""
    ) -> None:
        """Prompts share prefixes, so that caches hit."""
        prompt = (first, *range(2, 2 + length))
        if len(self.cluster.clients) < 12:
            self.cluster.submit(prompt, max_tokens, prefill, decode, late=late, lender=lender)
            self.cluster.advance(BREATH)

    @precondition(lambda self: any(client.ended for client in self.cluster.clients))
    @rule(index=INDEX, where=PAIR, handoff=st.booleans(), question=st.integers(1, 3), stalled=st.booleans())
    def go_on(self, index: int, where: tuple[str, str], handoff: bool, question: int, stalled: bool) -> None:
        """The next turn of a conversation, at an engine that is told of another which holds the history, and perhaps
        cannot read from it."""
        last = pick([client for client in self.cluster.clients if client.ended], index)
        prompt = (*last.request.prompt_token_ids, *last.tokens, question)
        prefill, decode = where
        if len(self.cluster.clients) < 12 and len(prompt) < 2 * NUM_BLOCKS - 4:
            handoff = handoff and prefill in SOURCES and decode in TARGETS
            lender = self.cluster.holder(prompt, prefill)
            if lender and stalled:
                self.cluster.held.add((lender, prefill))
            self.cluster.submit(prompt, 2, prefill, decode if handoff else prefill, late=False, lender=lender)
            self.cluster.advance(BREATH)

    @rule(seconds=st.sampled_from((0.03, 0.03, 0.1, 0.1, 0.6, 0.6, 1.9, 3.5)))
    def time_passes(self, seconds: float) -> None:
        self.cluster.advance(seconds)

    @precondition(lambda self: self.passed())
    @rule(index=INDEX)
    def deliver_ticket(self, index: int) -> None:
        self.cluster.deliver_ticket(pick(self.passed(), index))
        self.cluster.advance(BREATH)

    def decoding(self) -> list[Client]:
        return [client for client in self.cluster.clients if client.tokens and not client.ended]

    @precondition(lambda self: self.decoding())
    @rule(index=INDEX, to=TARGET, late=st.booleans())
    def migrate(self, index: int, to: str, late: bool) -> None:
        """Even to where it is, and again before the first move has ended."""
        if len(self.cluster.clients) < 16:
            self.cluster.migrate(pick(self.decoding(), index), to, late=late)
            self.cluster.advance(BREATH)

    @rule(prefill=SOURCE, decode=TARGET, to=TARGET, after=st.sampled_from((0.2, 0.4, 0.6)))
    def submit_and_migrate(self, prefill: str, decode: str, to: str, after: float) -> None:
        """In the midst of its decoding, if nothing is in the way."""
        if len(self.cluster.clients) < 12:
            self.cluster.submit((9, 8, 7), 16, prefill, decode, late=False)
            client = self.cluster.clients[-1]
            self.cluster.advance(after)
            self.cluster.migrate(client, to, late=False)
            self.cluster.advance(0.08)

    @precondition(lambda self: self.cluster.clients)
    @rule(index=INDEX, at_source=st.booleans())
    def cancel(self, index: int, at_source: bool) -> None:
        client = pick(self.cluster.clients, index)
        self.cluster.cancel(client, client.prefill if at_source else client.decode)
        self.cluster.advance(BREATH)

    @rule(engine_id=ENGINE)
    def freeze(self, engine_id: str) -> None:
        self.cluster.incarnations[engine_id].node.freeze()

    @precondition(lambda self: any(i.node.frozen for i in self.cluster.incarnations.values()))
    @rule(engine_id=ENGINE)
    def thaw(self, engine_id: str) -> None:
        self.cluster.thaw(engine_id)
        self.cluster.advance(BREATH)

    @rule(engine_id=ENGINE, restarted=st.booleans())
    def kill(self, engine_id: str, restarted: bool) -> None:
        if self.alive(engine_id):
            self.cluster.kill(engine_id)
        if restarted:
            self.cluster.restart(engine_id)
        self.cluster.advance(BREATH)

    @rule(pair=PAIR)
    def hold_reads(self, pair: tuple[str, str]) -> None:
        self.cluster.held.add(pair)

    @precondition(lambda self: self.cluster.held)
    @rule(index=INDEX)
    def let_reads_go(self, index: int) -> None:
        self.cluster.let_go(*pick(sorted(self.cluster.held), index))
        self.cluster.advance(BREATH)

    @precondition(lambda self: self.reads())
    @rule(index=INDEX, share=st.sampled_from((0.0, 0.5, 1.0)))
    def bytes_land_early(self, index: int, share: float) -> None:
        read = pick(self.reads(), index)
        self.cluster.soon(lambda: read.land(share))

    @precondition(lambda self: self.reads())
    @rule(index=INDEX, damaged=st.booleans())
    def read_ends(self, index: int, damaged: bool) -> None:
        """Even while its source is frozen or dead: its memory may still be mapped."""
        read = pick(self.reads(), index)
        self.cluster.soon(lambda: read.finish(damaged=damaged))
        self.cluster.advance(BREATH)

    @precondition(lambda self: self.reads())
    @rule(index=INDEX)
    def read_fails(self, index: int) -> None:
        read = pick(self.reads(), index)
        self.cluster.soon(lambda: read.fail("injected"))
        self.cluster.advance(BREATH)

    @precondition(lambda self: self.streams())
    @rule(index=INDEX, to_source=st.booleans(), fault=st.sampled_from(Fault), after=st.integers(0, 2))
    def line_misbehaves(self, index: int, to_source: bool, fault: Fault, after: int) -> None:
        """The next message but `after`."""
        stream = pick(self.streams(), index)
        line = stream.there if to_source else stream.back
        line.faults.extend([None] * after + [fault])

    @precondition(lambda self: self.streams())
    @rule(index=INDEX)
    def renewals_get_lost(self, index: int) -> None:
        """While what the source says of a new ticket is on its way for longer than its lease lasts."""
        stream = pick(self.streams(), index)
        stream.there.faults.extend([None] + [Fault.LOSE] * 5)
        stream.back.faults.append(Fault.HOLD_UP)
        self._use(stream, (4, 5, 6, index))
        self.cluster.advance(BREATH)

    @precondition(lambda self: self.streams())
    @rule(index=INDEX)
    def source_repeats_itself(self, index: int) -> None:
        """About a new ticket, of which it has several things to say."""
        stream = pick(self.streams(), index)
        stream.back.faults.extend([Fault.DOUBLE] * 6)
        self._use(stream, (7, 6, 5, 4, 3, 2, 1, index))
        self.cluster.advance(BREATH)

    @precondition(lambda self: self.streams())
    @rule(index=INDEX)
    def line_breaks(self, index: int) -> None:
        self.cluster.soon(pick(self.streams(), index).cut)
        self.cluster.advance(BREATH)
