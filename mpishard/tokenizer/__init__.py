"""Text in, text out: the tokenizer with the files beside it, chat templates, and the text of an
answer as it grows."""

from mpishard.tokenizer.detokenizer import IncrementalDetokenizer, finish_output
from mpishard.tokenizer.tokenizer import Tokenizer, has_tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "finish_output", "has_tokenizer"]
