"""What travels with every exported Hugging Face folder: its configuration, its model and its tokenizer. Files here are
copied as they are, so they import nothing of this repository.
"""
