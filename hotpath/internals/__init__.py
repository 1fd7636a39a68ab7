"""What PyTorch keeps to itself and this pack relies on. No other file names it, and each of these tells what becomes of
what it does where a newer PyTorch differs.
"""
