"""Parts of ``fuzz.py``: what is spoilt, what is run, and what must not happen meanwhile."""
