"""Runs: a directory each, with its identity, lock, metrics and the point to continue from."""
