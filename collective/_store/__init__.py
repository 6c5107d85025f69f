"""The parts of the tensor store: what it keeps, how it serves it, and how others hold and read it."""
