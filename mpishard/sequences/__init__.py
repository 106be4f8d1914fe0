"""Sequences of a batch: their KV caches, their sharding over ranks, and the packed step."""
