"""Where weights are while a MODEL samples: Offload Repeated Blocks, streams, dynamic VRAM, modulation ahead of time."""
