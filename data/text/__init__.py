"""Captions, rules for tags, weights of words, tokens, the user's strategy, and cached text encoder outputs."""
