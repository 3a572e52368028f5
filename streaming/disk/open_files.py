"""How many files this process may have open. Called once, before the experts' files are.

A shell on macOS allows 256; a checkpoint may have as many shards, each open on every disk that it is on.
"""

import resource

from config.errors import UsageError

# The pipe, saved prompts and libraries, beside the checkpoint: some 30.
OTHERS = 128


def allow_open_files(num_files: int) -> None:
    """Raises the soft limit where it does not allow so many files of a checkpoint beside the others.

    UsageError where the system's hard limit is below that.
    """
    wanted = num_files + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the checkpoint has {num_files} files to be read at a time, and this process may open {soft}; "
            f"raise the limit with: ulimit -n {wanted}"
        ) from error
