"""Pocket, the small GLM in the box: its checkpoint lies in `FOLDER`; training/pocket/ made it."""

from pathlib import Path

FOLDER = Path(__file__).parent
