"""The process group, decisions that all ranks share, DeepSpeed's ZeRO-3 engines, and the watchdog for hangs."""
