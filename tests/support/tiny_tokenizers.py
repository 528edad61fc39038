"""The tokenizers of the tiny SDXL, from the repository's files."""

from programs import TINY

from sdxl_trainer.data.text.tokens import END, Tokenizers, load_tokenizer


def load_tiny_tokenizers() -> Tokenizers:
    """Load the tokenizers of both text encoders."""
    return Tokenizers(load_tokenizer(TINY / "tokenizer", END), load_tokenizer(TINY / "tokenizer_2", "!"))
