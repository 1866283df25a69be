"""Measuring: the operator, a layer or a model beside what they replace, on a CPU or a GPU.

Each of ``op``, ``layer`` and ``model`` has ``Settings`` and a ``run`` that returns plain data; ``tables`` and ``plot``
show it. Nothing here is imported unless something is measured.
"""
