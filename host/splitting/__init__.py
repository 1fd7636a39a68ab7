"""One image over several devices: Split Repeated Blocks, the copies of a MODEL that it computes with."""
