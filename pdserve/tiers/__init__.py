"""KV below the device pool: one content-addressed store per worker, in host memory and on disk.

    device pool ──save──► host tier ──spill──► disk tier
         ▲                    │                   │
         └──────restore───────┴───────────────────┘

Every entry carries the checksum taken when its block was saved; it is spilled with the bytes and compared after
every restore, in the target memory itself. What does not verify is dropped and counted, never used.
"""
