"""Makes a streamable, quantised checkpoint out of an original one."""
