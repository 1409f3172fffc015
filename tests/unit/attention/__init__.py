"""Tests of the attention layer."""
