"""Gin bindings that are looked up when a dataset is opened, not when a task is registered."""

from __future__ import annotations

from collections.abc import Callable

import gin


def configured(function: Callable) -> Callable:
    """Returns `function` with the bindings of the gin configuration, where it has any."""
    try:
        return gin.get_configurable(function)
    except ValueError:  # no gin file has named it
        return function
