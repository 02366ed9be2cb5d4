"""Dry runs: which runs a selection would make, and their FLOPs, time, memory and disk, without making them."""
