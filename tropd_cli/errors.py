"""The one exception a user is meant to read: it becomes a single message and exit code 1."""

from __future__ import annotations


class UserError(Exception):
    """A problem the user can fix. The message names the value, what is allowed and what to type next."""
