"""`pdserve serve` with engines that take as long for a step as a profile says (benchmarks.paced_engine), and with
another rule than the controller's where the first argument names one: `python -m benchmarks.paced_serve RULE …`."""

import sys
from functools import partial
from unittest.mock import patch

from benchmarks.autoscaling import RULES
from pdserve.cli import main
from pdserve.cluster.launcher import LaunchSpec
from pdserve.cluster.process_launcher import ProcessLauncher, module_command
from pdserve.scaler.runner import Scaler


def _command(spec: LaunchSpec) -> tuple[str, ...]:
    if spec.module == "pdserve.launch.engine":
        return sys.executable, "-m", "benchmarks.paced_engine"
    return module_command(spec)


if __name__ == "__main__":
    rule = RULES[sys.argv.pop(1)]
    paced = patch("pdserve.launch.launchers.ProcessLauncher", partial(ProcessLauncher, command=_command))
    decided = patch("pdserve.cluster.scaling.Scaler", partial(Scaler, decide=rule()) if rule else Scaler)
    with paced, decided:
        main()
