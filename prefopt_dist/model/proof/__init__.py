"""The proof that a path of training computes a model's own numbers, on a small copy of the model's shape."""
