"""Tests of compiled kernels are skipped, in words, where there is no compiler."""

import inspect

import pytest

from kernels.selective_scan.cpu import why_not


def pytest_collection_modifyitems(items):
    reason = why_not("cpu")
    for item in items if reason else ():
        if item.path.parent.name == "kernels" and (
            getattr(item, "callspec", None) and item.callspec.params.get("impl") == "cpu" or '"cpu")' in inspect.getsource(item.function)
        ):
            item.add_marker(pytest.mark.skip(reason=reason))
