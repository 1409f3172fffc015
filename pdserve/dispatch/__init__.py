"""The life of a request across engines, from route to last token."""
