"""Parity with the official implementations, on small random weights: see ``__main__`` for the command."""
