"""The trained networks: U-Net, text encoders, conditioning, adapters, and parameter groups."""
