"""Development helpers around a real ComfyUI: tiny checkpoints, workflows, a host to run them, demo and bench.

They run in the environment that dev.py makes and are no part of the node pack.
"""
