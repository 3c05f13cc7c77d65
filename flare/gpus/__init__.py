"""The GPUs of this machine, and the selection for a run. ``python -m flare.gpus`` lists them."""
