"""From logits to the next token: sampling, and the grammars that bind it."""
