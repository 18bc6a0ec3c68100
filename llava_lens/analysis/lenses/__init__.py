"""Streams, image features, heads and neurons read as words."""
