"""What trained models lose."""
