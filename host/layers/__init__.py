"""Layers of the host and of other packs, as what a template has in their place."""
