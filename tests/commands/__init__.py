"""Tests of whole commands, as a user types them."""
