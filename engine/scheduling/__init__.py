"""Who runs in a step, in which blocks, and who has to wait or to go. No tensors."""
