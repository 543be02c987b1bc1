"""Where arrays live: named plans, meshes, and the kernel ops wrapped for them."""
