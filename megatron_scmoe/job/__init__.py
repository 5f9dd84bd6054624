"""The job around a training: ranks that mean the same, hangs that end, no process that outlives its launcher."""
