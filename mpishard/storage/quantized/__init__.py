"""The forms in which the weights of published checkpoints are quantized.

Each form is a module with the tensors that it stores for a matrix (O, I), and the function `decode`
of any part of the matrix. The numbers are float32 and not rounded any further.
`mpishard.storage.quantized.forms` has the table of the forms, and
`mpishard.storage.quantized.elements` says which stored elements a part of a matrix needs.
"""
