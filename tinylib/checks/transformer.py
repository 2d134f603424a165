"""Checks of this part of the course (written with its lesson)."""
