"""One run as a value, resolved from options, model and hardware; the experiment directory."""
