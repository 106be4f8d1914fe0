"""Batch jobs: lines of requests in, lines of answers out, and nothing lost in between."""
