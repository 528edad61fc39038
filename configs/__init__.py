"""The settings: pydantic schema, YAML presets and SDXL's component configs. Imports no other folder."""
