"""The time that a training step needs at least on a described device, part by part, beside the least operations."""
