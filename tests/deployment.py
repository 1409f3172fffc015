"""A real `pdserve serve` in processes of its own, for tests that kill, drain and ask it."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx

from tests.contract.processes import descendants, is_gone
from tests.waiting import eventually

START_TIMEOUT = 90.0
FREE_PORTS = ("--port", "0", "--grpc-port", "0", "--admin-port", "0")
SERVE = (sys.executable, "-c", "from pdserve.cli import main; main()", "serve", *FREE_PORTS, "--launcher", "process")


class Deployment:
    """Start with `start`. Everything it started is gone after `close`, by force if need be."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process = process
        self.log = log
        self.greeting = ""
        self.address = ""
        self.admin_address = ""

    @classmethod
    def start(
        cls,
        log: Path,
        *arguments: str,
        env: dict[str, str] | None = None,
        command: Sequence[str] = SERVE,
    ) -> Self:
        """Run `pdserve serve ARGUMENTS`, or another command that serves, on free ports, in plain processes
        unless told otherwise, and return at its ready line."""
        with log.open("w", encoding="utf-8") as stderr:
            process = subprocess.Popen(
                [*command, *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(env or {})},
            )
        deployment = cls(process, log)
        try:
            deployment._await_ready_line()
        except BaseException:
            deployment.close()
            raise
        return deployment

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin_address}"

    def engines(self) -> dict[str, dict[str, Any]]:
        """What GET /admin/engines says now, by engine id."""
        answer = httpx.get(f"{self.admin_url}/admin/engines", timeout=10).json()
        return {engine["id"]: engine for engine in answer["engines"]}

    def eventually(self, holds: Callable[[], bool], within: float = 30.0) -> None:
        """Ask until a condition holds; fails with the log when it does not in time."""
        # Where there is no gateway at a moment, there may be one at the next.
        eventually(holds, within, lambda: f"log:\n{self.log.read_text(encoding='utf-8')}", (httpx.HTTPError,))

    def is_ready(self) -> bool:
        return httpx.get(f"{self.url}/ready", timeout=10).status_code == 200

    def complete(self, prompt: str | list[int], **fields: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def children(self) -> list[int]:
        """Process ids of everything the supervisor started, workers of engines included."""
        return descendants(self.process.pid)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, within: float = 30.0) -> int:
        """Exit code of the supervisor."""
        return self.process.wait(within)

    def close(self) -> None:
        children = self.children()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        assert all(is_gone(pid, within=5) for pid in children)

    def _await_ready_line(self) -> None:
        assert self.process.stdout
        deadline = time.monotonic() + START_TIMEOUT
        while "\nCtrl-C" not in self.greeting:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise AssertionError(f"not ready in time; log:\n{self.log.read_text(encoding='utf-8')}")
            text = os.read(self.process.stdout.fileno(), 65536).decode()
            if not text:
                raise AssertionError(f"ended before it was ready; log:\n{self.log.read_text(encoding='utf-8')}")
            self.greeting += text
        if addresses := re.findall(r" at http://(\S+)\n", self.greeting)[:2]:  # engines alone have none
            self.address, self.admin_address = addresses


@contextmanager
def deployed(
    log: Path, *arguments: str, env: dict[str, str] | None = None, command: Sequence[str] = SERVE
) -> Iterator[Deployment]:
    deployment = Deployment.start(log, *arguments, env=env, command=command)
    try:
        yield deployment
    finally:
        deployment.close()


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """A configuration file; JSON is YAML."""
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path
