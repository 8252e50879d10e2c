"""The router: HTTP in, tokens out."""
