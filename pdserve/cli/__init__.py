"""The `pdserve` command.

Exit codes: 0 done, 1 it failed (nothing answers, engines could not serve), 2 the command line, the configuration or
the model is wrong, 130 ended by force (a second Ctrl-C).
"""

import sys


def main() -> None:
    from pdserve.cli.app import app
    from pdserve.core.errors import CheckpointError, ConfigError, PdserveError

    try:
        app()
    except PdserveError as error:
        print(f"pdserve: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError | CheckpointError) else 1)
