"""Times the DDF operator beside its peers at the sizes of Table 2: ``ddf-convert bench op`` by its old name.

python benchmarks/op.py --resolution 56 --json FILE
"""

import sys

from ddf_convert.cli import main

if __name__ == "__main__":
    main(["bench", "op", *sys.argv[1:]])
