"""From checkpoints to models and back."""
