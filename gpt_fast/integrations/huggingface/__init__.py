"""transformers' GPT-1 and GPT-2: weights to this library's models and back, and their modules on this library's ops."""
