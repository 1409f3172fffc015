"""The ready line: what to tell the person who started a deployment."""

import asyncio
import json

from pdserve.cluster.heartbeat import http_status
from pdserve.config.schema import Config
from pdserve.launch.ports import local_address

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0

EXAMPLE = (
    {
        "role": "system",
        "content": "Answer questions about Python in the manner of its documentation, briefly and kindly.",
    },
    {"role": "user", "content": "What does len() do?"},
)
"""Long enough to go through a prefill engine rather than be read by the decode engine."""


def welcome(config: Config, address: str) -> str:
    """Begins with "pdserve is ready", then a curl command that can be pasted."""
    engines = "the engines announced in Redis" if config.only == "router" else _engines(config)
    body = json.dumps(
        {
            "model": config.model_name,
            "messages": EXAMPLE,
            "stream": True,
        }
    )
    admin = local_address(config.admin_host, config.admin_port or 0)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_keys or config.tenants else ""
    return (
        f"\npdserve is ready: {engines} serve {config.model_name} at http://{address}\n"
        f"  metrics and engines (pdserve status) at http://{admin}\n"
        f"  curl -N http://{address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"    -d '{body}'\n"
        f"Ctrl-C lets running requests finish and stops everything.\n"
    )


def welcome_without_router(config: Config) -> str:
    """Of engines alone."""
    return (
        f"\npdserve is ready: {_engines(config)} of {config.model_name}, announced in Redis "
        f"({config.redis.namespace})\n"
        f"Ctrl-C lets running requests finish and stops everything.\n"
    )


def _engines(config: Config) -> str:
    pools = [f"{pool.engines} {role}" for role, pool in config.pools.by_role().items() if pool.engines]
    return f"{' + '.join(pools)} {'engine' if pools == ['1 unified'] else 'engines'}"


async def until_answering(address: str, path: str) -> None:
    """Return once GET path answers 200: only a client's view proves that a client would be served."""
    pause = _FIRST_PAUSE
    while await http_status(address, path) != 200:
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
