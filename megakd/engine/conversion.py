"""DeepSpeed's conversion of a state to a universal checkpoint, in a process apart that leaves none behind."""

import os
import runpy
import signal

from megakd.system.signals import end_with_parent


def main() -> None:
    """Its worker processes would wait for work for ever, or go on writing next to the conversion that comes after."""
    os.register_at_fork(after_in_child=end_with_parent(signal.SIGKILL))
    runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
