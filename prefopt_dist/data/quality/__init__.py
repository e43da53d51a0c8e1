"""What is wrong with tokenised data: findings counted row by row, lengths, a report. Numbers and text, no policy."""
