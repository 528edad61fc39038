"""Everything that touches a gradient or the U-Net: model, objective, engine, checkpoints."""
