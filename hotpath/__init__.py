"""The engine: finds repeated blocks, compiles one region per block structure, and counts what happened.

It imports torch and nothing of the host.
"""
