"""What runs between the HTTP process and the engine process: messages, protocol, supervision, admission."""
