"""The formats that figures are written in; nothing is imported here, for the commands' options need them too."""

from __future__ import annotations

FORMATS = ("svg", "png")
