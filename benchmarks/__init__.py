"""Comparisons that each run as one command and print a ratio."""
