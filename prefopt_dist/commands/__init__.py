"""One file a stage: read the configuration, put the parts together."""
