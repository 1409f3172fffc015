"""Tests of pdserve and its tools."""
