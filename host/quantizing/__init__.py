"""Quantize Repeated Blocks and its formats."""
