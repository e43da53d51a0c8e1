"""What a step costs: this package beside TRL's DPOTrainer, and both beside the floor in operations."""
