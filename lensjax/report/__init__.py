"""Selections as text and as data."""
