"""What is needed to open the tiers, as a value that can cross to another process."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """Sizes in bytes. Without a disk_path there is no disk tier.

    Engines may share the folder: each uses a part of it that is named after it."""

    host_bytes: int
    disk_path: Path | None = None
    disk_bytes: int = 0
