"""Floor of the engine: cache, steps, sampling and the generate loop."""
