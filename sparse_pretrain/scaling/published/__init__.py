"""Published raw results, refitted: one function a claim, from the public files to its numbers."""
