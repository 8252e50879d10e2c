"""Choosing tokens: one vectorised path for a batch of any parameters, and the noise that it draws by."""
