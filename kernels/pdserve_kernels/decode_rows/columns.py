"""What the columns of the table mean."""

POSITION, TOKEN, STREAM, TOP_K, TEMPERATURE, TOP_P, MIN_P = range(7)
TABLE = 8
"""One column is left out, so that block tables begin at a multiple of 16 bytes, as a step's own do: one compiled
attention kernel then serves both."""
