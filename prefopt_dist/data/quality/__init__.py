"""Inspect tokenised data: findings with examples, lengths, the policies of the section inspect, and a report."""
