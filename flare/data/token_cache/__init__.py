"""Documents tokenised once, in a cache that all runs on the same data share."""
