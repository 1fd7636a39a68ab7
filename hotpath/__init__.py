"""The engine: plans repeated blocks, compiles one region per block structure, keeps it, and counts what happened.

It imports torch and nothing of the host.
"""
