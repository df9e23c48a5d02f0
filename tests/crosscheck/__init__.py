"""A package, so that `from conftest import` in the tests above means their conftest.py and not this one."""
