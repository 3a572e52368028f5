"""What is seen of requests: live ones, lines in the log, counts for /metrics, and the last day."""
