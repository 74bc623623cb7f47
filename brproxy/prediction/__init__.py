"""Output-length prediction, pure: learns online from what finishes, forecasts each worker's load."""
