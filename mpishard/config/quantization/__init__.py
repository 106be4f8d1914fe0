"""How the weights of a checkpoint are stored: what its ``quantization_config`` says."""
