"""The chart's engines of several pods, as processes: a leader and the other hosts of its ranks, by their own commands
and probes."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from deploy.chart import overlaid, values_file
from tests.flows.test_chart_pods import decoding_pod, record, stream, text
from tests.pods import Pod, Pods, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VALUES = overlaid(
    values_file("cpu-demo"),
    {"decode": {"replicas": 2}, "config": {"pools": {"decode": {"tensor_parallel": 2, "hosts": 2}}}},
)
GROUPS = {f"pdserve-decode-{number}": f"pdserve-decode-{number}-1" for number in range(2)}
"""Each leader and its other host."""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    with running(VALUES, tmp_path_factory.mktemp("pods")) as pods:
        yield pods


def start(*pods: Pod) -> None:
    for pod in pods:
        pod.start()
    for pod in pods:
        pod.until("startupProbe", 200)
        pod.until("readinessProbe", 200)


def test_helm_test_passes_with_decode_engines_of_two_pods(release: Pods) -> None:
    pod = release.helm_test()
    assert pod.ended() == 0, pod.said()
    assert "disaggregated" in pod.said()


@dataclass
class Answer:
    """One that is being written, by a leader and its other host. whole: what it says when nothing happens."""

    whole: str
    begun: list[dict[str, Any]]
    events: Iterator[dict[str, Any]]
    leader: Pod
    host: Pod


def begin(release: Pods, prompt: list[int]) -> Answer:
    whole = text(list(stream(release, prompt)))
    events = stream(release, prompt)
    begun = [next(events) for _ in range(5)]
    leader = release.pods[decoding_pod(release)]
    return Answer(whole, begun, events, leader, release.pods[GROUPS[leader.name]])


def test_a_deleted_group_loses_no_token_and_its_hosts_stay_until_it_has_drained(release: Pods) -> None:
    answer = begin(release, [7 + 13 * n % 500 for n in range(80)])
    leader, host = answer.leader, answer.host
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, answer.events)
        host.delete()
        leader.delete()
        assert (leader.ended(), host.ended()) == (0, 0), leader.said() + host.said()
        told = [*answer.begun, *rest.result(60)]
    assert text(told) == answer.whole
    assert {move["reason"] for move in record(told)["migrations"]} == {"drain"}
    start(leader, host)


def test_a_host_that_dies_takes_its_engine_and_the_answer_goes_on_elsewhere(release: Pods) -> None:
    answer = begin(release, [11 + 17 * n % 500 for n in range(80)])
    leader, host = answer.leader, answer.host
    assert host.process
    host.process.send_signal(signal.SIGKILL)
    assert text([*answer.begun, *answer.events]) == answer.whole
    leader.until("readinessProbe", 503)
    host.close()
    start(host)
    leader.until("readinessProbe", 200)
