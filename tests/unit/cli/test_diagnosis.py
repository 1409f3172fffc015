"""What is said about the check of a pair: failures, warnings, and what to do."""

from dataclasses import replace

import pytest

from pdserve.cli.diagnosis import Level, diagnose
from pdserve.cli.doctor import Examination, render, to_json
from pdserve.core.pair_check import MachineFacts, PairCheck, SizeCheck, Transport

FACTS = MachineFacts(boot_id="a", versions=(("pdserve", "1"), ("nixl-cu13", "1.5")), rdma_devices=(), cma_refused="")
ELSEWHERE = replace(FACTS, boot_id="b")
WITH_RDMA = replace(FACTS, rdma_devices=("mlx5_0",))
SIZES = (
    SizeCheck(num_bytes=98304, pulls=9, seconds=0.001, wire=0.0005, verify=0.0001),
    SizeCheck(num_bytes=6 << 20, pulls=9, seconds=0.002, wire=0.001, verify=0.0005),
)
GOOD = PairCheck(
    source="prefill-0",
    target="decode-1",
    backend="nixl",
    transport=Transport.MEMORY,
    round_trip=0.0004,
    clock_offset=0.001,
    sizes=SIZES,
    source_facts=FACTS,
    target_facts=FACTS,
)


def test_a_good_pair_has_no_findings() -> None:
    assert diagnose(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "level", "advice"),
    [
        ({"transport": Transport.TCP}, Level.FAILURE, "ptrace_scope=0"),
        (
            {"transport": Transport.TCP, "source_facts": replace(FACTS, cma_refused="scope is 1"), "backend": "grpc"},
            Level.FAILURE,
            "copy directly: scope is 1",
        ),
        (
            {
                "transport": Transport.TCP,
                "source_facts": WITH_RDMA,
                "target_facts": replace(WITH_RDMA, boot_id="b"),
            },
            Level.FAILURE,
            "mlx5_0",
        ),
        ({"transport": Transport.TCP, "source_facts": ELSEWHERE}, Level.WARNING, "no RDMA device"),
        ({"clock_offset": -0.5}, Level.WARNING, "NTP"),
        ({"source_facts": replace(FACTS, versions=(("pdserve", "2"),))}, Level.WARNING, "one image"),
        ({"error": ("digest_mismatch", "damaged")}, Level.FAILURE, "cables"),
        ({"error": ("something_new", "broken")}, Level.FAILURE, "logs"),
    ],
    ids=["tcp on one machine", "why not", "tcp beside rdma", "only tcp", "clock", "versions", "damage", "unknown"],
)
def test_every_fault_is_named_with_what_to_do(changes: dict[str, object], level: Level, advice: str) -> None:
    (finding,) = diagnose(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert finding.level is level
    assert advice in finding.advice


def test_differing_versions_are_told_by_name() -> None:
    other = replace(FACTS, versions=(("pdserve", "2"),))
    (finding,) = diagnose(replace(GOOD, source_facts=other))
    assert finding.what == "versions differ: nixl-cu13 missing and 1.5, pdserve 2 and 1"


def test_failures_come_before_warnings() -> None:
    findings = diagnose(replace(GOOD, clock_offset=9.0, error=("link_lost", "gone")))
    assert [finding.level for finding in findings] == [Level.FAILURE, Level.WARNING]


def test_people_see_a_table_and_what_to_do() -> None:
    bad = replace(GOOD, source="prefill-1", transport=Transport.TCP)
    checks = (GOOD, bad)
    text = render(Examination(checks, tuple(tuple(diagnose(check)) for check in checks), ("decode-2 is suspect",)))
    head, first, second, *_ = text.splitlines()
    assert head.split()[:2] == ["SOURCE", "TARGET"]
    expected = "prefill-0 decode-1 nixl memory 0.40 ms 1.00 ms 96 KiB 0.10 6 MiB 3.15 good"
    assert " ".join(first.split()) == expected
    assert second.endswith("failure")
    assert "FAILURE prefill-1 → decode-1: KV goes over TCP (backend nixl)" in text
    assert "FAILURE decode-2 is suspect" in text


def test_programs_see_findings_with_each_pair() -> None:
    import json

    examination = Examination((GOOD,), ((),), ())
    told = json.loads(to_json(examination))
    assert told["passed"] is True
    assert told["pairs"][0]["findings"] == []
    assert told["pairs"][0]["sizes"][1]["num_bytes"] == 6 << 20


def test_an_absent_engine_or_a_failure_fails_the_examination() -> None:
    assert Examination((GOOD,), ((),), ()).passed
    assert not Examination((GOOD,), ((),), ("decode-2 is suspect",)).passed
    slow_clock = replace(GOOD, clock_offset=9.0)
    assert Examination((slow_clock,), (tuple(diagnose(slow_clock)),), ()).passed
    tcp = replace(GOOD, transport=Transport.TCP)
    assert not Examination((tcp,), (tuple(diagnose(tcp)),), ()).passed
