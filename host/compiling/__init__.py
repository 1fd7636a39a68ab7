"""Compile Repeated Blocks: plans of blocks, regions for them, when they are compiled and what is kept of them."""
