"""Shards: write, read, resume."""
