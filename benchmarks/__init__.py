"""What measures the pack beside its alternatives: ratios of sides that take turns in one run."""
