"""Using a checkpoint: this room makes text, numbers and pictures of trained models."""
