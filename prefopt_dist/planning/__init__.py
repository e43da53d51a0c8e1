"""Estimates of a job's memory, steps, time and disk, by arithmetic, before anything is loaded."""
