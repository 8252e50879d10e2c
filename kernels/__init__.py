"""What touches KV in memory. `reference` is plain torch: the truth, and the CPU path."""
