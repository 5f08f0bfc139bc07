"""What the attention brings: studies over models and seeds, and whether its maps are faithful."""
