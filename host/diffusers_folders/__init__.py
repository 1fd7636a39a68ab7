"""Flux transformers in the folders of diffusers, to and from a MODEL."""
