"""Parameters, MACs, memory and time of modules."""
