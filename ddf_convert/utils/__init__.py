"""Helpers that know nothing of conversion."""
