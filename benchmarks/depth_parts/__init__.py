"""The parts of benchmarks/depth_motorcycle.py."""
