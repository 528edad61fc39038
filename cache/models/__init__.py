"""Model files: single files, diffusers folders, hub ids, and loading of the frozen networks."""
