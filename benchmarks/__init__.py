"""One script for each set of published numbers: ``python -m benchmarks.NAME``. It writes results/NAME.json."""

from flare.logs import quiet_torchao

quiet_torchao()
