"""Between text and tokens: tokenizer, chat template, detokenizer."""

from ktd.text.detokenizer import IncrementalDetokenizer
from ktd.text.model import Prompt, TextModel

__all__ = ["IncrementalDetokenizer", "Prompt", "TextModel"]
