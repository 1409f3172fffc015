"""What the columns of the table mean."""

POSITION, TOKEN, STREAM, TOP_K, TEMPERATURE, TOP_P, MIN_P, TABLE = range(8)
