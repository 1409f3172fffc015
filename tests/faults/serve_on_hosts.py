"""`pdserve serve` with each engine on a host of its own (tests.namespaces): arguments are the configuration and
the namespaces' prefix."""

import asyncio
import sys
from pathlib import Path

from pdserve.cluster.launcher import LaunchSpec
from pdserve.cluster.process_launcher import ProcessLauncher, module_command
from pdserve.config.load import load_config
from pdserve.launch.deployment import GATEWAY
from pdserve.launch.ports import settle_ports
from pdserve.launch.serve import supervise
from pdserve.telemetry.logs import configure_logs


def main(config_file: str, prefix: str) -> int:
    def command(spec: LaunchSpec) -> tuple[str, ...]:
        here = () if spec.name == GATEWAY else ("ip", "netns", "exec", f"{prefix}{spec.name}")
        return *here, *module_command(spec)

    config = load_config(Path(config_file), env={})
    configure_logs(json=False, level=config.log.level)
    return asyncio.run(supervise(settle_ports(config), ProcessLauncher(command=command)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
