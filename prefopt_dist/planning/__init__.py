"""What a job will need, by arithmetic, before anything is loaded: memory, steps, time, disk."""
