"""The prefill service: *fill* a token sequence, publish its blocks, give the next token."""
