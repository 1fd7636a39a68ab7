"""Benchmark Model: made-up inputs, sides in turns, and what a step takes without compiled blocks."""
