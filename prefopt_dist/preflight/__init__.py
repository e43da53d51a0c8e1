"""Check of a job's machines before it starts: each examines itself, then all of them do a timed all-reduce."""
