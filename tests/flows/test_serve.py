"""`pdserve serve` as a user runs it: real processes, real KV transfers, signals, deaths."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdserve.core.endpoint import Role
from pdserve.simulator.calibration import LEAST_STEPS
from pdserve.simulator.profile import load_profile
from tests.checkpoints import make_checkpoint
from tests.collector import Collector, collecting
from tests.contract.processes import is_gone
from tests.deployment import Deployment, deployed, write_config

LONG = "the other nation is here and there on the road to ruin " * 4
FIELDS = ["id", "role", "epoch", "pid", "address", "state", "running", "waiting", "kv_blocks"]
BLOCKS = ["total", "free", "used", "leased", "quarantined"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def config(checkpoint: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "model": str(checkpoint),
        "served_model_name": "tiny",
        "device": "cpu",
        "kv": {"memory": "8MiB"},
        "times": {"drain_timeout": 20},
        "telemetry": {"otlp_endpoint": collector.endpoint},
    }
    return write_config(tmp_path_factory.mktemp("config") / "cluster.yaml", settings)


@pytest.fixture(scope="module")
def running(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment tests may kill parts of, and must leave ready."""
    with deployed(tmp_path_factory.mktemp("log") / "serve.log", str(config)) as deployment:
        yield deployment


def run_cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from pdserve.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def record(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()["pdserve"]
    return answer


def test_the_ready_line_shows_a_command_that_works_as_it_stands(running: Deployment) -> None:
    assert "pdserve is ready: 1 prefill + 1 decode engines serve tiny at http://127.0.0.1:" in running.greeting
    command = running.greeting[running.greeting.index("curl") : running.greeting.index("Ctrl-C")]
    script = command.replace("curl -N", "curl -sS -N --max-time 60").replace('"stream"', '"max_tokens": 3, "stream"')
    answer = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=90, check=True).stdout
    assert answer.startswith("data: {")
    assert answer.rstrip().endswith("data: [DONE]")


def test_a_long_prompt_goes_through_both_engines_and_a_short_one_does_not(running: Deployment) -> None:
    long, short = record(running.complete(LONG)), record(running.complete("the road"))
    assert long["mode"] == "disaggregated"
    assert (long["prefill"]["engine"], long["decode"]["engine"]) == ("prefill-0", "decode-0")
    assert long["transfer"]["bytes"] > 0
    assert short["mode"] == "decode_local"


def test_status_prints_exactly_the_promised_names(running: Deployment) -> None:
    done = run_cli("status", "--port", running.address.rpartition(":")[2], "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert list(answer) == ["engines"]
    assert [list(engine) for engine in answer["engines"]] == [FIELDS, FIELDS]
    assert [list(engine["kv_blocks"]) for engine in answer["engines"]] == [BLOCKS, BLOCKS]
    assert [(engine["id"], engine["role"], engine["state"]) for engine in answer["engines"]] == [
        ("prefill-0", "prefill", "ready"),
        ("decode-0", "decode", "ready"),
    ]


def test_calibrate_prints_a_profile_the_simulator_takes(running: Deployment, config: Path, tmp_path: Path) -> None:
    port = running.address.rpartition(":")[2]
    for number in range(LEAST_STEPS):
        record(running.complete(f"{number} times: {LONG}", max_tokens=3))

    def calibrated() -> bool:
        profile.write_text(run_cli("calibrate", str(config), "--port", port).stdout, encoding="utf-8")
        return bool(profile.stat().st_size)

    profile = tmp_path / "profile.yaml"
    running.eventually(calibrated)  # the engines' next heartbeats bring their last steps
    costs = load_profile(str(profile))
    assert (costs.name, costs.kv_tokens) == ("tiny", running.engines()["decode-0"]["kv_blocks"]["total"] * 16)
    assert 0 < costs.step_cost(Role.PREFILL).base < 1
    assert 0 < costs.links.latency < 1


def test_explain_accounts_for_a_requests_time_across_processes(running: Deployment) -> None:
    answered = record(running.complete("Explain this: " + LONG))
    port = running.address.rpartition(":")[2]
    done = run_cli("explain", answered["request_id"], "--port", port, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    names = [span["name"] for span in told["timeline"]]
    assert {"tokenize", "route", "submit", "queue", "prefill", "first token", "pull", "release", "decode"} <= set(names)
    assert all(span["seconds"] >= 0 for span in told["timeline"])
    assert told["unaccounted_seconds"] < 0.1 * told["total_seconds"]
    assert told["route"]["prefill"] == answered["prefill"]["engine"]
    shown = run_cli("explain", "--port", port)
    assert answered["request_id"] in shown.stdout
    assert "over nixl" in shown.stdout or "over shared_memory" in shown.stdout


def test_a_clients_trace_goes_on_over_gateway_and_engines(running: Deployment, collector: Collector) -> None:
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body = {"prompt": "Trace this: " + LONG, "max_tokens": 4, "ignore_eos": True}
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    answered = record(httpx.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=60))

    def trace() -> dict[str, dict[str, str]]:
        ours = [span for span in collector.spans() if span.trace_id.hex() == trace_id]
        return {span.name: {a.key: a.value.string_value for a in span.attributes} for span in ours}

    running.eventually(lambda: {"completions", "prefill", "transfer", "decode"} <= trace().keys())
    for stage, engine in (("prefill", "prefill"), ("transfer", "decode"), ("decode", "decode")):
        assert trace()[stage]["pdserve.engine.id"] == answered[engine]["engine"]
        assert trace()[stage]["pdserve.engine.epoch"] == answered[engine]["epoch"]
    [root] = [span for span in collector.spans() if span.name == "completions" and span.trace_id.hex() == trace_id]
    assert root.parent_span_id.hex() == span_id


def test_metrics_of_a_handoff_are_exported(running: Deployment) -> None:
    backend = record(running.complete("Count this: " + LONG))["transfer"]["backend"]
    text = httpx.get(f"{running.admin_url}/metrics", timeout=10).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values[f'pdserve_transfers_total{{backend="{backend}",result="ok"}}']) >= 1
    assert float(values[f'pdserve_transferred_bytes_total{{backend="{backend}"}}']) > 0
    for stage in ("queue", "prefill", "transfer", "decode"):
        assert float(values[f"pdserve_{stage}_seconds_count"]) >= 1


def test_the_doctor_finds_the_only_pair_well(running: Deployment) -> None:
    port = running.address.rpartition(":")[2]
    done = run_cli("doctor", "--port", port)
    assert done.returncode == 0, done.stdout + done.stderr
    head, row = done.stdout.splitlines()[:2]
    assert head.startswith("SOURCE")
    assert row.split()[:4] in [["prefill-0", "decode-0", backend, "memory"] for backend in ("nixl", "shared_memory")]
    told = json.loads(run_cli("doctor", "--port", port, "--json").stdout)
    assert told["passed"] is True
    assert [pair["error"] for pair in told["pairs"]] == [None]
    unknown = httpx.post(f"{running.admin_url}/admin/pairs/prefill-0/decode-7/check", timeout=10)
    assert unknown.status_code == 404
    assert "decode-7" in unknown.json()["error"]["message"]


def test_status_shows_a_table_to_people(running: Deployment) -> None:
    done = run_cli("status", "--port", running.address.rpartition(":")[2])
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split()[:4] == ["ENGINE", "ROLE", "STATE", "PID"]
    assert [row.split()[:3] for row in rows] == [["prefill-0", "prefill", "ready"], ["decode-0", "decode", "ready"]]


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_killed_engine_comes_back_under_a_new_epoch_and_serves(running: Deployment, victim: str) -> None:
    before = running.engines()
    os.kill(before[victim]["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = running.engines()
        return bool(now[victim]["state"] == "ready" and now[victim]["epoch"] != before[victim]["epoch"])

    running.eventually(is_back)
    running.eventually(running.is_ready)
    after = running.engines()
    assert after[victim]["pid"] != before[victim]["pid"]
    other = "decode-0" if victim == "prefill-0" else "prefill-0"
    assert after[other]["epoch"] == before[other]["epoch"]
    assert record(running.complete(f"{victim} is back: {LONG}"))["mode"] == "disaggregated"


def test_a_frozen_engine_is_fenced_and_replaced(running: Deployment) -> None:
    before = running.engines()["decode-0"]
    os.kill(before["pid"], signal.SIGSTOP)
    running.eventually(lambda: running.engines()["decode-0"]["epoch"] != before["epoch"])
    assert is_gone(before["pid"], within=0)
    running.eventually(running.is_ready)


def test_a_killed_gateway_comes_back_on_its_port_while_the_engines_live_on(running: Deployment) -> None:
    epochs = {id: engine["epoch"] for id, engine in running.engines().items()}
    engines = {engine["pid"] for engine in running.engines().values()}
    [gateway] = [pid for pid in running.children() if pid not in engines]
    os.kill(gateway, signal.SIGKILL)
    running.eventually(lambda: gateway not in running.children() and running.is_ready(), within=40)
    assert {id: engine["epoch"] for id, engine in running.engines().items()} == epochs
    # Ready with the first engine it reaches: until it has both, one pool serves alone.
    running.eventually(lambda: all(engine["state"] == "ready" for engine in running.engines().values()))
    assert record(running.complete("the gateway is back: " + LONG))["mode"] == "disaggregated"


def test_idle_engines_have_all_their_blocks_free(running: Deployment) -> None:
    record(running.complete(LONG))

    def all_free() -> bool:
        blocks = [engine["kv_blocks"] for engine in running.engines().values()]
        return all(b["free"] == b["total"] > 0 for b in blocks)

    running.eventually(all_free)


def test_ctrl_c_lets_a_running_answer_finish_and_leaves_no_process(config: Path, tmp_path: Path) -> None:
    with deployed(tmp_path / "log", str(config)) as deployment:
        children = deployment.children()
        assert len(children) == 3
        body = {"prompt": LONG, "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            deployment.signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(rest)
        assert deployment.wait() == 0
        assert all(is_gone(pid, within=0) for pid in children)


def test_while_draining_new_requests_are_refused(config: Path, tmp_path: Path) -> None:
    with deployed(tmp_path / "log", str(config)) as deployment:
        body = {"prompt": LONG, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            deployment.signal(signal.SIGTERM)
            deployment.eventually(lambda: deployment.complete("x").status_code == 503, within=10)
            assert httpx.get(f"{deployment.url}/ready", timeout=10).status_code == 503
            children = deployment.children()
            deployment.signal(signal.SIGTERM)
            assert deployment.wait(within=10) == 130
        assert all(is_gone(pid, within=5) for pid in children)


def test_when_the_supervisor_is_killed_everything_dies_with_it(config: Path, tmp_path: Path) -> None:
    with deployed(tmp_path / "log", str(config)) as deployment:
        children = deployment.children()
        assert len(children) == 3
        deployment.signal(signal.SIGKILL)
        assert all(is_gone(pid, within=5) for pid in children)


def test_a_taken_port_is_a_clear_error_and_leaves_nothing_running(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cli("serve", str(config), "--port", str(port), "--grpc-port", "0")
    assert done.returncode == 2
    assert f"port: {port} on 127.0.0.1 is in use" in done.stderr


def test_a_model_that_cannot_be_served_is_a_clear_error(tmp_path: Path) -> None:
    done = run_cli("serve", "--model", str(tmp_path))
    assert done.returncode == 2
    assert "has no config.json; give a Hugging Face checkpoint directory" in done.stderr

    checkpoint = make_checkpoint(tmp_path / "model", "mistral")
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps({**raw, "sliding_window": 32}), encoding="utf-8")
    done = run_cli("serve", "--model", str(checkpoint), "--port", "0", "--grpc-port", "0", "--launcher", "process")
    assert done.returncode == 2
    assert "sliding" in done.stderr.splitlines()[-1]
