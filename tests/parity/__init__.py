"""The engine's arithmetic against transformers and against itself."""
