"""The parts of ``gpu_check.py``: each has a function that takes the run and fills in its record."""
