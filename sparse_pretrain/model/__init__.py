"""The decoder: layers, blocks, and the language model made of them."""
