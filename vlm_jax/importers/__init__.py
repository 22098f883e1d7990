"""Weights of other frameworks: opened, and laid out for our models."""
