"""Doors to the outside: other libraries' weights, and text out of a model."""
