"""How a run is going, on one line of a terminal."""

import asyncio
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pdserve_loadgen.result import Outcome
from pdserve_loadgen.runner import Runner

REFRESH = 0.25


async def show_progress(runner: Runner, console: Console) -> None:
    """Redraws until cancelled; leaves nothing behind. Ends at once where there is no terminal."""
    if not console.is_terminal:
        return
    tally = Tally(runner)
    with suppress(asyncio.CancelledError), Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(Text(tally.line()), refresh=True)
            await asyncio.sleep(REFRESH)


class Tally:
    """Counts results as they come, each once, however long the run."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._counted = 0
        self._tokens = 0
        self._failed = 0
        self._ttft = 0.0

    def line(self) -> str:
        results = self._runner.results
        for result in results[self._counted :]:
            self._tokens += result.output_tokens
            self._failed += result.outcome is Outcome.ERROR
            self._ttft = result.ttft if result.ttft is not None else self._ttft
        self._counted = len(results)
        elapsed = self._runner.elapsed
        rate = self._tokens / elapsed if elapsed > 0 else 0.0
        return (
            f"{elapsed:6.1f} s  sent {self._runner.sent}  in flight {self._runner.in_flight}  "
            f"ended {self._counted}  failed {self._failed}  {rate:.0f} tokens/s  last TTFT {self._ttft * 1e3:.0f} ms"
        )
