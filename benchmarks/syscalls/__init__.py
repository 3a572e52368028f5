"""Faults injected below the server: system calls that fail, fall short or take long, by a seed."""
