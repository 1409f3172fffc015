"""Whole runs against an endpoint whose delays and failures are scripted."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdserve_loadgen.arrivals import Arrivals
from pdserve_loadgen.command import execute
from pdserve_loadgen.endpoint import Api
from pdserve_loadgen.errors import Unreachable, UsageError
from pdserve_loadgen.report import Outcome
from pdserve_loadgen.run import Run, run, write_json, write_record
from pdserve_loadgen.settings import Settings
from tests.scripted_endpoint import Script, serving, unused_port

QUIET = Console(file=StringIO())


def settings(url: str, **options: Any) -> Settings:
    """200 requests/s, so that a test is over at once."""
    fast = {} if {"concurrency", "trace"} & options.keys() else {"rate": 200.0}
    given = {"url": url, "requests": 10, "input": "40", "output": "5", **fast, **options}
    kinds = {"api": Api(given.get("api", "chat")), "arrivals": Arrivals(given.get("arrivals", "poisson"))}
    return Settings(**given | kinds)


async def against(script: Script, **options: Any) -> Run:
    with serving(script) as url:
        return await run(settings(url, **options), QUIET)


def measured(script: Script) -> list[dict[str, Any]]:
    """What the endpoint saw, but the two probes."""
    return script.seen[2:]


async def test_delays_of_the_server_are_what_is_measured() -> None:
    outcome = await against(Script(first=0.1, gap=0.03), arrivals="constant", rate=20.0)
    report = outcome.report
    assert (report.requests, report.succeeded, report.failed) == (10, 10, 0)
    shown = report.to_dict()
    medians = {name: shown[name]["p50"] for name in ("ttft", "tpot", "itl", "e2e", "handoff_gap")}
    assert 0.09 < medians["ttft"] < 1.0
    assert 0.21 < medians["e2e"] < 2.0
    assert all(0.025 < medians[name] < 0.5 for name in ("tpot", "itl", "handoff_gap"))
    assert shown["itl"]["count"] == 40
    assert (report.output_tokens, report.input_tokens) == (50, 10 * 39)
    assert report.duration > 9 / 20


async def test_prompts_have_the_length_the_server_counts() -> None:
    script = Script()
    outcome = await against(script, input="uniform:9:400", requests=20, concurrency=1)
    seen = [len(body["messages"][0]["content"].split()) * 2 + 7 for body in measured(script)]
    assert sorted(result.input_tokens for result in outcome.results) == sorted(seen)
    planned = [planned.input_tokens for planned in settings("http://x", input="uniform:9:400", requests=20).plan()]
    assert all(abs(wanted - got) <= 1 for wanted, got in zip(planned, seen, strict=True))


async def test_the_body_asks_for_a_counted_stream_of_full_length() -> None:
    script = Script()
    await against(script, requests=1, extra_body='{"temperature": 0}', api_key="k")
    body = measured(script)[0]
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("scripted", 5, 0)
    assert body["stream"] is body["stream_options"]["include_usage"] is body["ignore_eos"] is True
    assert set(script.keys) == {"Bearer k"}


async def test_completions_send_a_prompt_and_ignore_eos_can_be_left_out() -> None:
    script = Script()
    outcome = await against(script, api="completions", ignore_eos=False, model="mine", requests=2)
    assert outcome.report.succeeded == 2
    body = measured(script)[0]
    assert body["path"] == "/v1/completions"
    assert len(body["prompt"].split()) == pytest.approx((40 - 7) / 2, abs=1)
    assert "ignore_eos" not in body
    assert body["model"] == "mine"


async def test_same_seed_same_prompts() -> None:
    def texts(script: Script) -> list[str]:
        return sorted(body["messages"][0]["content"] for body in measured(script))

    one, same, other = Script(), Script(), Script()
    for script, seed in ((one, 4), (same, 4), (other, 5)):
        await against(script, seed=seed)
    assert texts(one) == texts(same) != texts(other)


async def test_a_closed_loop_keeps_as_many_in_flight_as_asked() -> None:
    script = Script(first=0.01)
    outcome = await against(script, concurrency=3, requests=12)
    assert outcome.report.succeeded == 12
    assert script.most_at_once == 3


async def test_a_closed_loop_ends_with_its_time_and_finishes_what_it_began() -> None:
    outcome = await against(Script(first=0.02), concurrency=2, requests=None, duration=0.3)
    assert 4 <= outcome.report.succeeded <= 40
    assert outcome.report.failed == 0


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    script = Script(first=1.5)
    outcome = await against(script, arrivals="constant", rate=50.0)
    assert script.most_at_once > 5, "a closed loop would have had one at a time"
    assert max(result.scheduled for result in outcome.results) == pytest.approx(9 / 50)
    assert all(result.lateness >= 0 for result in outcome.results)


async def test_a_conversation_carries_its_answers_along() -> None:
    script = Script()
    outcome = await against(script, concurrency=1, requests=1, turns=3)
    assert [result.turn for result in outcome.results] == [0, 1, 2]
    first, _, last = (body["messages"] for body in measured(script))
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[0] == first[0]
    assert last[1]["content"] == "w0 w1 w2 w3 w4 "
    assert len({result.id for result in outcome.results}) == 3


async def test_a_replayed_trace_repeats_shared_prefixes() -> None:
    script = Script()
    trace = Path(__file__).parent / "samples" / "mooncake.jsonl"
    outcome = await against(script, trace=trace, requests=None, speed=1000.0, length_scale=0.125, max_output=3)
    assert outcome.report.succeeded == len(trace.read_text().splitlines())
    words = [body["messages"][0]["content"].split() for body in measured(script)]
    shared = (64 - 7) // 2
    assert len({tuple(prompt[:shared]) for prompt in words}) == 1
    assert len({tuple(prompt[: shared + 20]) for prompt in words}) == len(words)


async def test_cancelled_requests_hang_up_on_the_server_and_are_no_errors() -> None:
    script = Script(gap=0.01)
    outcome = await against(script, cancel_fraction=1.0, output="100")
    assert outcome.report.cancelled == 10
    assert outcome.report.errors == {}
    assert all(len(result.token_times) < 100 for result in outcome.results)
    assert script.hung_up > 0


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (Script(status=503), "http_503:scripted"),
        (Script(error_after=2), "stream:engine_died"),
        (Script(garbage=True), "stream_unreadable"),
        (Script(break_after=2), "connection_lost"),
    ],
)
async def test_failures_are_counted_by_their_code(script: Script, code: str) -> None:
    outcome = await against(script, requests=3)
    assert outcome.report.errors == {code: 3}
    assert not outcome.report.passed


async def test_a_request_that_takes_too_long_is_a_timeout() -> None:
    outcome = await against(Script(gap=1.0), requests=2, timeout=0.5)
    assert outcome.report.errors == {"timeout": 2}


async def test_without_usage_pieces_are_counted_and_the_report_says_so() -> None:
    outcome = await against(Script(usage=False), requests=4)
    assert outcome.report.output_tokens == 20
    assert outcome.report.input_tokens == 160
    assert "no usage" in " ".join(outcome.report.notes)


@pytest.mark.parametrize(("longest", "is_remarked"), [(3, True), (5, False)])
async def test_answers_that_end_early_are_remarked(longest: int, is_remarked: bool) -> None:
    outcome = await against(Script(longest_answer=longest), requests=4)
    assert ("answers had 60% of the tokens" in " ".join(outcome.report.notes)) is is_remarked
    assert ("answers had" in " ".join(outcome.report.notes)) is is_remarked


async def test_warm_up_is_sent_and_not_measured() -> None:
    script = Script()
    outcome = await against(script, requests=4, warmup=3)
    assert (outcome.report.requests, outcome.report.warmup) == (4, 3)
    assert len(measured(script)) == 7


async def test_nothing_listening_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="nothing answers"):
        await run(settings(f"http://127.0.0.1:{unused_port()}"), QUIET)
    with pytest.raises(Unreachable, match="connect_failed"):
        await run(settings(f"http://127.0.0.1:{unused_port()}", model="m"), QUIET)
    with pytest.raises(Unreachable, match="no model"):
        await against(Script(models=()))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rate": None}, "one of them"),
        ({"concurrency": 1, "rate": 1.0}, "one of them"),
        ({"trace": Path("t.jsonl"), "rate": 1.0}, "its own arrivals"),
        ({"trace": Path("t.jsonl"), "turns": 2}, "its own turns"),
        ({"trace": Path("absent.jsonl")}, "cannot read"),
        ({"url": "127.0.0.1:80"}, "not an address"),
        ({"extra_body": "[1]"}, "--extra-body"),
        ({"extra_body": "{"}, "--extra-body"),
        ({"input": "many"}, "lengths"),
        ({"slo": "ttft"}, "--slo"),
    ],
)
async def test_options_that_contradict_are_refused_before_anything_is_sent(
    options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        await run(settings(**{"url": f"http://127.0.0.1:{unused_port()}", **options}), QUIET)


async def test_a_terminal_sees_progress() -> None:
    screen = StringIO()
    with serving(Script(first=0.3)) as url:
        await run(settings(url, requests=2), Console(file=screen, force_terminal=True, width=120))
    assert "in flight" in screen.getvalue()


async def test_an_interrupted_run_reports_what_had_ended() -> None:
    script = Script(first=0.02)
    with serving(script) as url:
        running = asyncio.create_task(run(settings(url, requests=10_000, rate=20.0), QUIET))
        while len(script.seen) < 12:
            await asyncio.sleep(0.05)
        running.cancel()
        outcome = await running
    assert outcome.interrupted
    assert outcome.report.succeeded > 3
    assert "interrupted" in outcome.report.notes[0]


async def test_files_hold_report_and_requests_but_no_text(tmp_path: Path) -> None:
    outcome = await against(Script(), requests=3, warmup=1, api_key="secret")
    write_json(outcome.report, tmp_path / "report.json")
    write_record(outcome.results, tmp_path / "record.jsonl")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["requests"] == 3
    assert report["ttft"]["count"] == 3
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert sorted(line["warmup"] for line in lines) == [False, False, False, True]
    assert all(line["request_id"] == f"server-{line['id']}" for line in lines)
    assert all(len(line["token_times"]) == line["output_tokens"] == 5 for line in lines)
    written = (tmp_path / "report.json").read_text() + (tmp_path / "record.jsonl").read_text()
    assert "secret" not in written
    assert all(line["outcome"] == Outcome.OK for line in lines)
    with pytest.raises(UsageError, match="cannot write"):
        write_json(outcome.report, tmp_path / "absent" / "report.json")


def test_exit_codes_tell_pass_fail_and_misuse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with serving(Script(first=0.02)) as url:
        options = {"url": url, "rate": 100.0, "requests": 3, "output": "2", "api": "chat", "arrivals": "constant"}
        assert execute({**options, "slo": "ttft=5"}, tmp_path / "a.json", None) == 0
        assert "PASS" in capsys.readouterr().out
        assert execute({**options, "slo": "ttft=0.001"}, None, None) == 1
        assert "FAIL: 0 of 3" in capsys.readouterr().out
        assert execute({**options, "slo": "ttft=x"}, None, None) == 2
        assert capsys.readouterr().err.startswith("loadgen: --slo")
    assert json.loads((tmp_path / "a.json").read_text())["passed"] is True
    assert execute({**options, "url": f"http://127.0.0.1:{unused_port()}"}, None, None) == 2
    assert "nothing answers" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_with_a_report_and_130() -> None:
    script = Script(first=0.02)
    with serving(script) as url:
        command = [sys.executable, "-m", "pdserve_loadgen", "run", "--url", url, "--rate", "20", "--requests", "9999"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                while len(script.seen) < 12:
                    time.sleep(0.05)
                process.send_signal(signal.SIGINT)
                out, _ = process.communicate(timeout=20)
            finally:
                process.kill()
    assert process.returncode == 130
    assert "interrupted" in out
