"""The machines of a job before it starts: each looks at itself, then all reduce together; what is bad is named."""
