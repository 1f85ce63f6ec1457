"""What was measured, and what shows it: this room reads run.jsonl files alone."""
