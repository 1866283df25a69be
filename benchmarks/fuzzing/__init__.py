"""The parts of ``fuzz.py``: what is corrupted, what is run, and what must not happen meanwhile."""
