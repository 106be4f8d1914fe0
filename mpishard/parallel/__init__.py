"""Floor of parallelism: one module per parallelism, arithmetic and collectives in plain sight."""
