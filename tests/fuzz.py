"""How much the fuzz tests try: the same code in the short tier and in `make torture`."""

import os

import pytest

SHORT = 1_000
LONG = int(os.environ.get("BERTPIPE_FUZZ_CASES", "100000"))

tiers = pytest.mark.parametrize(
    "cases", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.torture)]
)
"""Gives a test its number of `cases`, numbered from 0; the long tier's begin with the short one's."""
