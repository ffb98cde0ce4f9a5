"""Packaged gin files. An `__init__.py` in every folder makes an editable install find them."""
