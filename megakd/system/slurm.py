"""Slurm's queue, as far as verbs ask for it."""

import subprocess


def in_queue(job: str) -> bool | None:
    """Whether a job waits, runs or ends; None where Slurm cannot be asked."""
    line = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        asked = subprocess.run(line, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode:  # Slurm forgets jobs some minutes after their end
        return False if "Invalid job id" in asked.stderr else None
    return bool(asked.stdout.strip())
