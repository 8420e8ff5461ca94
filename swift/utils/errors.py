"""The one exception that means "the user can fix this": the entries print its message and end with status 2."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in input, configuration or environment. The message names the offending value and what is legal."""


def require(condition: bool, name: str, value: object, legal: str) -> None:
    """Raise UserError "name=value: legal" unless the condition holds."""
    if not condition:
        raise UserError(f"{name}={value}: {legal}")


class BadScan(UserError):
    """One scan cannot be used. Carries a reason for the report; a run over many scans names it and goes on."""
