"""Memory, FLOPs and layout of a run, computed from shapes before anything is loaded. No torch."""
