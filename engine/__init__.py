"""The engine: a page pool of KV, a scheduler, a runner of the model, and the transfer between pool and store."""
