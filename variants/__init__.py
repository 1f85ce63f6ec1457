"""Other models, one small file each, run by train_gpt.py's loop."""
