"""A real Prometheus that scrapes one address every second."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.chart.promtool import BUILD, missing

START_TIMEOUT = 60.0


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query. Fails for what Prometheus does not take."""
        answer = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=30).json()
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
