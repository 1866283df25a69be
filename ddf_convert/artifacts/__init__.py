"""Converted models on disk."""
