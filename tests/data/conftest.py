"""What the tests of the data share."""

from __future__ import annotations

from hypothesis import settings

# No time limit for an example: it says how busy the machine is, not whether the code is right.
settings.register_profile("swift", deadline=None)
settings.load_profile("swift")
