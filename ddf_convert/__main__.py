"""``python -m ddf_convert`` is ``ddf-convert``: for torchrun, which starts modules."""

from ddf_convert.cli import main

if __name__ == "__main__":
    main()
