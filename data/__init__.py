"""Images, captions, metadata, and latent files."""
