"""The store node: an arena of committed blocks, an index over their names, and the client that workers use."""
