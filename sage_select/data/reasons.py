"""Reasons to set a record aside, and notes on records that are used."""

from typing import NamedTuple


class Note(NamedTuple):
    """Something about a record that its user should know, although the record can be used.

    Attributes:
        text: What is the case, and what to set; equal for all records with the same problem.
        example: The part of this record that shows it.
    """

    text: str
    example: str = ""


class BadRecord(Exception):
    """Reason a record cannot be used. Reasons are counted, so equal reasons have equal texts."""
