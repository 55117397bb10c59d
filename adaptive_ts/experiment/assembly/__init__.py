"""What a config becomes: samplers, the model, the state and the train step."""
