"""A package, so that its files may be called as those beside it are: conftest.py, too."""
