"""Commands: one file a stage, which reads the configuration and puts the parts together."""
