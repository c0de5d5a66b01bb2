"""The tests are a package, so that ``tests.statistics`` is never taken for the standard library's ``statistics``."""
