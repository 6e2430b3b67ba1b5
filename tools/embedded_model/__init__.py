"""How the embedded model is made: task generator, tokenizer, training and evaluation. README.md has the commands."""
