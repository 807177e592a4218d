"""`from interlace.testing import <Kind>Conformance`: every suite is there, and costs only what it uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

import interlace.testing
from interlace.hookspecs import KINDS
from interlace.testing.conformance import Conformance

LIGHT = ("ExecutorConformance", "OrderingConformance", "SchedulerConformance")
"""Suites that need no torch themselves."""


def test_every_name_is_a_suite():
    for name in interlace.testing.SUITES:
        suite = getattr(interlace.testing, name)
        assert issubclass(suite, Conformance) and suite.__name__ == name


def test_every_kind_has_a_suite():
    suites = [getattr(interlace.testing, name) for name in interlace.testing.SUITES]
    assert sorted(suite.kind for suite in suites) == sorted(KINDS)


def test_all_is_the_table():
    assert sorted(interlace.testing.__all__) == sorted(interlace.testing.SUITES)


@pytest.mark.parametrize("name", LIGHT)
def test_light_suites_do_not_load_torch(name):
    code = f"import sys; from interlace.testing import {name}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_name():
    with pytest.raises(ImportError, match="SchedulersConformance"):
        from interlace.testing import SchedulersConformance  # noqa: F401
