"""From a checkpoint to a model that can be paged, or a sentence that says why it cannot."""
