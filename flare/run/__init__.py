"""The run as one value, resolved from options, model and hardware; the experiment directory."""
