"""The command line: what it accepts, what it says, and how it exits."""

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import pdserve
from pdserve import cli
from pdserve.cli.app import app
from pdserve.config.load import load_config
from pdserve.core.errors import ConfigError
from pdserve.telemetry.explain import explain
from tests.unit.telemetry.records import disaggregated, replayed

ENGINE = {
    "id": "decode-0",
    "role": "decode",
    "epoch": "18446744073709551615",
    "pid": 4321,
    "address": "127.0.0.1:9",
    "state": "ready",
    "running": 3,
    "waiting": 1,
    "kv_blocks": {"total": 100, "free": 60, "used": 25, "leased": 10, "quarantined": 5},
}
LINKS = {"id": "decode-0", "lost": ["prefill-0", "prefill-2"]}


class Gateway(http.server.BaseHTTPRequestHandler):
    """A gateway's admin port, as far as commands ask it; `key` and `body` are set per test."""

    server: http.server.HTTPServer
    key = ""
    body = json.dumps({"engines": [ENGINE]})

    def do_GET(self) -> None:
        allowed = not self.key or self.headers["Authorization"] == f"Bearer {self.key}"
        live = json.dumps({"status": "live", "admin_port": self.server.server_port})
        others = {"/live": live, "/admin/links": json.dumps({"engines": [LINKS]})}
        body = others.get(self.path, self.body)
        known = self.path in (*others, "/admin/engines", "/admin/requests/cmpl-abc", "/admin/requests/last")
        if not known:
            body = json.dumps({"error": {"message": "it is not kept"}})
        self.send_response(401 if not (allowed or self.path == "/live") else 200 if known else 404)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(Gateway, "key", "")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `pdserve ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["pdserve", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_version_and_help_are_quick_because_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from pdserve.cli.app import app\n"
        "heavy = {'torch', 'grpc', 'fastapi', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "app(['--version'])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, f"pdserve {pdserve.__version__}\n"), done.stderr
    assert time.monotonic() - started < 5


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert all(name in shown.output for name in ("serve", "status", "explain", "config"))


def test_status_passes_the_gateways_json_through(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(monkeypatch, capsys, "status", "--port", str(port), "--json")
    assert code == 0
    assert json.loads(out) == {"engines": [ENGINE]}


def test_status_shows_every_number_of_an_engine_in_a_table(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(monkeypatch, capsys, "status", "--port", str(port))
    header, row = out.splitlines()
    assert code == 0
    titles = "ENGINE ROLE STATE PID ADDRESS RUNNING WAITING KV FREE USED LEASED QUARANTINED TOTAL LOST LINKS"
    assert " ".join(header.split()) == titles
    assert " ".join(row.split()) == "decode-0 decode ready 4321 127.0.0.1:9 3 1 60 25 10 5 100 prefill-0, prefill-2"


def test_status_takes_the_port_from_the_environment(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORT", str(port))
    assert run(monkeypatch, capsys, "status")[0] == 0


def test_status_sends_the_key_and_asks_for_one_when_it_is_missing(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Gateway, "key", "very-secret")
    code, _, err = run(monkeypatch, capsys, "status", "--port", str(port))
    assert code == 1
    assert "wants an API key; give --api-key or set PDSERVE_API_KEY" in err
    assert run(monkeypatch, capsys, "status", "--port", str(port), "--api-key", "very-secret")[0] == 0


def test_status_says_so_when_nothing_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, "status", "--port", "1")
    assert (code, out) == (1, "")
    assert "nothing answers at http://127.0.0.1:1/live" in err
    assert "start it with `pdserve serve` or give its --port" in err


def test_status_is_not_fooled_by_another_server(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Gateway, "body", "<html>")
    code, _, err = run(monkeypatch, capsys, "status", "--port", str(port))
    assert code == 1
    assert "is this a pdserve gateway?" in err


def test_explain_draws_the_timeline_and_says_why(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Gateway, "body", json.dumps(explain(disaggregated())))
    code, out, _ = run(monkeypatch, capsys, "explain", "cmpl-abc", "--port", str(port))
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "cmpl-abc  completions  ok (length), took 105.0 ms"
    assert "64 prompt tokens, 4 of them cached; 12 output tokens" in out
    assert "route: disaggregated on prefill-0 → decode-0: cheapest" in out
    assert "predicted first token 50.0 ms (was 34.0 ms), handoff gap 10.0 ms (was 14.0 ms)" in out
    assert "later tokens 2.0 ms (was 4.5 ms)" in out
    assert "rather than disaggregated on prefill-1 → decode-0: cost 2, +0.5 against the choice (busier)" in out
    assert "transfer: 4.0 KiB over shared_memory in 2 pulls, progressive; handoff gap 14.0 ms" in out
    assert "predicted after the last chunk: progressive 3.0 ms, bulk 5.0 ms" in out
    assert "nixl failed (transfer_failed), another took over" in out
    [prefill] = [line for line in lines if line.split()[:2] == ["prefill", "prefill-0"]]
    assert prefill.split()[2:4] == ["25.00", "19.00"]
    assert prefill.count("█") == round(19 / 105 * 40)
    assert lines[-1].split() == ["in", "no", "span", "0.00"]
    assert all(len(line) <= 140 and line == line.rstrip() for line in lines)


def test_explain_tells_of_attempts_that_were_lost(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Gateway, "body", json.dumps(explain(replayed())))
    code, out, _ = run(monkeypatch, capsys, "explain", "--port", str(port))
    assert code == 0
    assert "attempt 1: disaggregated on prefill-0 → decode-0 was lost after 1 tokens (engine_died: decode-0" in out


def test_explain_passes_json_through_and_repeats_what_the_gateway_refuses_with(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Gateway, "body", json.dumps(explain(disaggregated())))
    code, out, _ = run(monkeypatch, capsys, "explain", "last", "--json", "--port", str(port))
    assert (code, json.loads(out)["request_id"]) == (0, "cmpl-abc")
    code, _, err = run(monkeypatch, capsys, "explain", "../engines", "--port", str(port))
    assert code == 1
    assert err == "pdserve: it is not kept\n"


def test_dry_run_prints_the_configuration_that_flags_and_file_make_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("api_keys: [very-secret-key]\npools: {decode: {engines: 3}}\n", encoding="utf-8")
    monkeypatch.setenv("GRPC_PORT", "9999")
    code, out, _ = run(
        monkeypatch, capsys, "serve", str(file), "--dry-run", "--prefill", "2", "--device", "cpu", "--port", "80"
    )
    shown = yaml.safe_load(out)
    assert code == 0
    assert (shown["pools"]["prefill"]["engines"], shown["pools"]["decode"]["engines"]) == (2, 3)
    assert (shown["device"], shown["port"], shown["grpc_port"]) == ("cpu", 80, 9999)
    assert "very-secret" not in out


def test_config_show_prints_a_file_that_can_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(monkeypatch, capsys, "config", "show")
    file = tmp_path / "shown.yaml"
    file.write_text(out, encoding="utf-8")
    assert code == 0
    assert run(monkeypatch, capsys, "config", "show", str(file))[1] == out


def test_a_wrong_configuration_exits_with_2_and_lists_the_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prot: 1\n", encoding="utf-8")
    for arguments in (("config", "check", str(file)), ("serve", str(file))):
        code, out, err = run(monkeypatch, capsys, *arguments)
        assert (code, out) == (2, "")
        assert 'prot: unknown key; did you mean "port"?' in err


def test_a_router_for_a_model_without_weights_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {model}\ndiscovery: {{engines: ['127.0.0.1:9']}}\n", encoding="utf-8")
    code, _, err = run(monkeypatch, capsys, "route", str(file), "--port", "0", "--grpc-port", "0")
    assert code == 2
    assert f"{model} lacks model.safetensors" in err


def test_what_speaks_no_http_is_no_gateway(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def settings_frame(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = threading.Thread(target=settings_frame, args=(server,))
        answering.start()
        code, _, err = run(monkeypatch, capsys, "status", "--port", str(server.getsockname()[1]))
        answering.join(10)
    assert code == 1
    assert "is this a pdserve gateway?" in err


def test_a_wrong_option_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(monkeypatch, capsys, "serve", "--prefil", "1")
    assert code == 2
    assert "--prefill" in err


def test_a_new_key_comes_with_the_hash_the_configuration_wants(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["keys", "new", "--tenant", "search"])
    key, _, rest = made.output.partition("\n")
    path = tmp_path / "cluster.yaml"
    path.write_text(rest, encoding="utf-8")
    [tenant] = load_config(path).tenants
    assert tenant.name == "search"
    assert tenant.keys == (f"sha256:{sha256(key.encode()).hexdigest()}",)
    assert len(key) > 40
    hashed = CliRunner().invoke(app, ["keys", "hash"], input=f"{key}\n")
    assert hashed.output.strip() == tenant.keys[0]
    other = CliRunner().invoke(app, ["keys", "new"]).output.partition("\n")[0]
    assert other != key


def test_a_key_that_can_be_guessed_is_not_hashed() -> None:
    refused = CliRunner().invoke(app, ["keys", "hash"], input="letmein\n")
    assert isinstance(refused.exception, ConfigError)
