"""What `fuzz_inputs.py` damages, how it runs commands, and how it judges what they say."""
