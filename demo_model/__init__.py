"""Trains pdserve's demo model from the Python documentation; see README.md for the order of the steps."""
