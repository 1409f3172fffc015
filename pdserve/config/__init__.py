"""The operator's input: one file, parsed once, validated loudly, passed on as narrow pieces."""
