"""What attention brings: accuracy over models and seeds, and the faithfulness of its maps."""
