"""The engine's loop, scheduler, store and reader on a simulated clock: what a machine will do, without it."""
