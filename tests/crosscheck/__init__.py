"""A package: `from conftest import` in the tests above means their conftest.py, not this one."""
