"""One script a published number; results with their provenance in results/. Run as ``python -m benchmarks.NAME``."""

from flare.logs import quiet_torchao

quiet_torchao()
