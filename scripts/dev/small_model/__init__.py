"""The parts of `train_small_model.py`: text, network, training, and what is written."""
