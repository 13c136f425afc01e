"""A model for ser-edge; there is nothing to import."""
