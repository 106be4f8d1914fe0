"""Floor of description: configuration, layout and the table that cuts the weights."""
