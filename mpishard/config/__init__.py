"""Configuration: models, layouts, and how weights are sharded."""
