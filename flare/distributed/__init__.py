"""Processes: the group, DDP and FSDP2, the preflight check, lost peers and hangs."""
