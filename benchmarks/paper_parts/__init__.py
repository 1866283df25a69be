"""Parts of ``paper_tables.py``: the paper's figures, the models that they are of, times on this machine, the page."""
