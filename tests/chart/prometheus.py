"""A real Prometheus that scrapes one address every second."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.chart.promtool import BUILD, missing
from tests.chart.rules import expressions, metrics_in

START_TIMEOUT = 60.0


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query. Fails for what Prometheus does not take, raises HTTPError while it starts."""
        response = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=30)
        if response.status_code == 503:
            response.raise_for_status()
        answer = response.json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def metrics(self) -> dict[str, str]:
        """Type of each metric it has scraped, by name."""
        answer = httpx.get(f"{self._url}/api/v1/metadata", timeout=30).json()
        return {name: entries[0]["type"] for name, entries in answer["data"].items()}

    def is_scraping(self) -> bool:
        with suppress(httpx.HTTPError):
            return [result["value"][1] for result in self.query("up")] == ["1"]
        return False


def assert_scraped(prometheus: Prometheus, of: Callable[[str], bool]) -> None:
    """Every query of rules and dashboard is one, and what metrics they read were scraped, those `of` is true for."""
    kinds = prometheus.metrics()
    for place, expression in expressions().items():
        prometheus.query(expression)
        for name in filter(of, metrics_in(expression)):
            base = name if name in kinds else re.sub(r"_(bucket|sum|count)$", "", name)
            assert base in kinds, f"{place}: {name}"
            assert (base == name) == (kinds[base] != "histogram"), f"{place}: {name}"


@contextmanager
def scraping(target: str, listen: str, folder: Path) -> Iterator[Prometheus]:
    """Open once the target (host:port) was scraped. listen is where Prometheus itself is."""
    built = BUILD / "prometheus" / "usr" / "bin" / "prometheus"
    found = shutil.which("prometheus") or (str(built) if built.exists() else missing("prometheus"))
    scrape = {"job_name": "pdserve", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
    (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}), encoding="utf-8")
    command = [found, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={listen}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        prometheus = Prometheus(f"http://{listen}")
        deadline = time.monotonic() + START_TIMEOUT
        while not prometheus.is_scraping():
            assert time.monotonic() < deadline, (folder / "prometheus.log").read_text(encoding="utf-8")
            time.sleep(0.1)
        yield prometheus
    finally:
        process.kill()
        process.wait()
