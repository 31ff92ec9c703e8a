"""Which index suits the vectors that lie in a collection."""
