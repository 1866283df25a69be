"""Benchmarks of the operator, a layer or a model beside what they replace, on a CPU or a GPU; and doctor's checks.

``op``, ``up``, ``layer`` and ``model`` have settings and a ``run`` that returns plain data for ``tables`` and ``plot``.
"""
