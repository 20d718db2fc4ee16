"""Tests of the tasks that measure accuracy."""
