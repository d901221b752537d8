"""The error of every data source."""

from __future__ import annotations


class DataError(ValueError):
    """A data source that is missing, damaged or not of the expected form; the message is for the user."""
