"""The ground that every room stands on: identity, block layout, the store's interface, errors, configuration."""
