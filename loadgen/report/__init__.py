"""What a run found: statistics, the JSON document that every command writes, and tables."""
