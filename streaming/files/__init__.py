"""What lies in a checkpoint's files: headers, where each expert's bytes are, and how it is read."""
