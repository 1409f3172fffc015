"""Plain values and protocols every other layer speaks in. No third-party imports besides blake3."""
