"""Floor of communication: the mesh, the collectives and the ledger that counts them."""
