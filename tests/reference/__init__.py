"""The oracle: the method in plain PyTorch, written for reading, free of the code it judges."""
