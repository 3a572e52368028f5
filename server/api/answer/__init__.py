"""From engine events to text, JSON and server-sent events."""
