"""What a day does: its steps, and what they leave."""
