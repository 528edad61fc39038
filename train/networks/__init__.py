"""The trained networks: U-Net, text encoders, text conditioning, adapters, and parameter groups."""
