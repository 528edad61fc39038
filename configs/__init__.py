"""Settings: one pydantic model per section, YAML presets, and SDXL's component configs. Imports no other folder."""
