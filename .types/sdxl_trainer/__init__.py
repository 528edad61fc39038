"""Fine-tuning of Stable Diffusion XL at scale: latent cache, training under DeepSpeed, and model export.

The sub-packages lie in the folders of the same name at the top of the checkout; setup.py maps them.
"""

__version__ = "0.2.0"
