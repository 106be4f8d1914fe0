"""Floor of storage: Hugging Face directories and HDF5 shards."""
