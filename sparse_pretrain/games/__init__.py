"""Game solvers as pure functions of arrays."""
