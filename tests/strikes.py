"""Orders for failpoints."""

from pathlib import Path


def order_strike(folder: Path, engine_id: str, point: str, blow: str) -> Path:
    """Make the engine die (`kill`), freeze (`stop`) or wait (`hold`) the next time it reaches the point, or the process
    whose id follows the blow. Returns the file, which the engine takes; it appears with its content, or the engine
    could take it empty."""
    order = folder / f"{engine_id}.{point}"
    draft = folder / f".{order.name}"
    draft.write_text(blow, encoding="utf-8")
    return draft.rename(order)
