"""What only Apple silicon would show, counted without weights: one script for each count."""
