"""`python -m pdserve_loadgen run …`, the same as `pdserve loadgen run …`."""

from pdserve_loadgen.cli import app

app(prog_name="loadgen")
