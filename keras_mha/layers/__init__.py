"""What a Keras model holds."""
