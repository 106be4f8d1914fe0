"""The engine: scheduler, prefix cache, sampling and the generate loop. KV caches and steps are in
`mpishard.sequences`."""
