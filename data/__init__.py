"""Everything that touches an image, a caption, metadata or a latent file."""
