"""`helm test`: stream one completion and see that its KV went from a prefill to a decode engine."""

import json
import os
import time
import urllib.error
import urllib.request

URL = os.environ["PDSERVE_URL"]
KEY = os.environ["PDSERVE_API_KEY"]
PATIENCE = 60.0
"""Seconds until engines of both pools have been found."""


def stream() -> tuple[int, dict[str, object]]:
    """Chunks of text that came, and the record of the last one. The prompt is new, so no cache holds it."""
    prompt = f"{time.time_ns()} " * 16
    body = json.dumps({"prompt": prompt, "max_tokens": 16, "ignore_eos": True, "stream": True}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    texts = 0
    record: dict[str, object] = {}
    with urllib.request.urlopen(urllib.request.Request(f"{URL}/v1/completions", body, headers), timeout=60) as answer:
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                event = json.loads(data)
                texts += bool(event["choices"] and event["choices"][0]["text"])
                record = event.get("pdserve", record)
    return texts, record


def engine(record: dict[str, object], role: str) -> str:
    trace = record.get(role)
    return str(trace["engine"]) if isinstance(trace, dict) else "none"


def main() -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            texts, record = stream()
            seen = f"{texts} chunks, {record.get('mode')}: {engine(record, 'prefill')} -> {engine(record, 'decode')}"
            if texts > 1 and record.get("mode") == "disaggregated":
                print(f"passed: {seen}")
                return
        except (urllib.error.URLError, OSError) as error:
            seen = str(error)
        if time.monotonic() > deadline:
            raise SystemExit(f"failed: no completion went from prefill to decode within {PATIENCE:g} s; last: {seen}")
        time.sleep(2)


main()
