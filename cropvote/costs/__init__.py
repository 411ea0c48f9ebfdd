"""What a split costs, counted before anything is trained."""
