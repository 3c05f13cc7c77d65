"""Which GPUs this machine has and which a run takes. ``python -m flare.gpus`` lists them."""
