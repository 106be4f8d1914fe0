"""Floor of arithmetic: NumPy alone, no MPI and no files."""
