"""The decode service: *continue* a token sequence, and stream its tokens."""
