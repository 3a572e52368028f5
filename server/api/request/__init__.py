"""What a request's body is, checked once and turned into types."""
