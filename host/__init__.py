"""The only place that knows ComfyUI: where blocks, weights, options and progress live."""
