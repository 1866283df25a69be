"""The commands of ``ddf_convert.cli``, a module for each group of them: parse, call, print."""
