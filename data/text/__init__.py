"""Captions, tokens, the user's strategy, and cached text encoder outputs."""
