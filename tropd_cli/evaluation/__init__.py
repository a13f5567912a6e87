"""What `tropd eval` does with a model: tasks -> keyed samples, written as they come -> verdicts and divergences."""
